"""What is wrong with a config, found before any work."""

import os
import re
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from configs.schema import Config, Task
from pruning import models
from pruning.masks import GROUPS, Target, parse_pattern
from pruning.pruner import check_layers
from pruning.result.plan import GIB
from pruning.result.request import resolve_subject, shapes_of
from search.plan import check_texts, leaves_of
from search.resident import Memory
from search.seeds import read_seeds
from search.worker_memory import Held, device_line, host_lines, needs_of

_HUB_ID = re.compile(r"(?!models/)\w[\w.-]*/[\w.-]+")
"""Owner and name; `models/` is where `make smollm2` puts its folder."""


def validate(config: Config) -> list[str]:
    """Check all of a config that can be checked without work.

    Returns:
        One line for each thing that could not be checked here.

    Raises:
        ValueError: If something is wrong; one line that names it.
    """
    for pattern in {config.pruning.pattern, *(task.pattern for task in config.all_tasks)}:
        parse_pattern(str(pattern))
    read_seeds(config.search.seeds, GROUPS)
    notes = dict.fromkeys(check_texts(config))
    for task in config.all_tasks:
        windows = task.texts["fitness"].windows
        if config.search.stages and windows and config.search.stages[-1] >= windows:
            raise ValueError(
                f"search.stages must be below fitness.windows = {windows}, got "
                f"{config.search.stages}"
            )
        assert task.model
        if task.model == models.EMBEDDED or Path(task.model).is_dir():
            _check_model(task.model, task)
        elif _HUB_ID.fullmatch(task.model):
            note = f"model {task.model}: it comes from the Hugging Face hub: not checked"
            notes[note] = None
        else:
            raise ValueError(
                f"model {task.model!r} is no folder: give embedded, a folder or a hub id"
                + (" (`make smollm2` builds it)" if "smollm2" in task.model else "")
            )
    return list(notes)


def memory_lines(config: Config) -> list[str]:
    """Return what a worker and a node hold, in lines; no weight is read.

    Raises:
        ValueError: If it cannot fit; one line with what is needed, what is there, the way out.
    """
    held = {}
    for task in config.all_tasks:
        assert task.model and task.dtype
        folder = _folder_of(task.model)
        if folder is None:
            return [f"memory: model {task.model}: its config is not here: not known"]
        held[(task.model, task.dtype, *task.texts.values())] = _held(folder, task, config)
    ray = config.ray
    needs = needs_of(
        list(held.values()),
        leaves_of(config),
        Memory(**config.memory.model_dump()),
        whole_model=any(task.pattern == "unstructured" for task in config.all_tasks),
        on_gpu=ray.gpus_per_worker > 0,
        by_ray=ray.workers != 0,
    )
    lines = [
        f"memory: {role} has windows: null: the hidden states of a whole text are not counted"
        for role in ("calibration", *(("fitness",) if config.search.objective == "kl" else ()))
        if any(task.texts[role].windows is None for task in config.all_tasks)
    ]
    lines += [device_line(needs, _device_memory(config))] if needs.device else []
    return lines + host_lines(needs, _workers_here(config), psutil.virtual_memory().available)


def _folder_of(model: str) -> str | None:
    """Return where a model's config is on this machine; None if it is not."""
    if model == models.EMBEDDED or Path(model).is_dir():
        return model
    cached = try_to_load_from_cache(model, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else None


def _held(folder: str, task: Task, config: Config) -> Held:
    texts = task.texts
    calibration, fitness = texts["calibration"], texts["fitness"]
    assert task.dtype
    return Held(
        model=models.skeleton(models.load_config(folder), models.DTYPES[task.dtype]),
        dtype=task.dtype,
        calibration=calibration.windows or 0,
        calibration_length=calibration.length,
        longest=max(text.length for role, text in texts.items() if role != "calibration"),
        kept_tokens=(config.search.objective == "kl") * (fitness.windows or 0) * fitness.length,
    )


def _device_memory(config: Config) -> float | None:
    """Return bytes of a GPU that a worker has; None if no GPU is here and none is stated."""
    ray = config.ray
    stated = None if ray.gpu_memory is None else ray.gpu_memory * GIB
    here = None
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        here = min(torch.cuda.get_device_properties(i).total_memory for i in devices)
    # The workers of a cluster have other GPUs than this machine.
    whole = here or stated if ray.address == "local" else stated or here
    return whole and whole * min(1.0, ray.gpus_per_worker)


def _workers_here(config: Config) -> int | None:
    """Return how many workers this machine will have; None if they are a cluster's."""
    ray = config.ray
    if ray.workers == 0:
        return 1
    if ray.address != "local":
        return None
    if ray.gpus_per_worker:
        room = max(1, int(torch.cuda.device_count() // ray.gpus_per_worker))
        return min(ray.workers or room, room)
    return ray.workers or max(1, (os.cpu_count() or 1) // ray.cpus_per_worker)


def _check_model(model: str, task: Task) -> None:
    config = models.load_config(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for role, text in task.texts.items():
        if limit and text.length > limit:
            raise ValueError(
                f"{role}.length must be at most the model's {limit} positions, got {text.length}"
            )
    if pattern := parse_pattern(str(task.pattern)):
        subject = resolve_subject(model, str(task.dtype), "cpu", None)
        check_layers(shapes_of(subject), Target(task.sparsity or 0.0, pattern))
