"""This machine: its description, and whether it has the cores and memory that workers need."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

from configs.schema import Config, Ray
from pruning import models
from pruning.result.plan import GIB
from search.experiment import Experiment
from search.worker_memory import Held, device_line, host_lines, needs_of


def description() -> dict[str, object]:
    """Return versions and devices, as JSON."""
    packages = ("torch", "transformers", "deap", "ray", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
    }


def check_cores(ray: Ray) -> None:
    """Check that this machine has the cores that each worker asks for.

    Raises:
        ValueError: If a worker asks for more than there are.
    """
    cores = os.cpu_count() or 1
    if (ray.workers == 0 or ray.address == "local") and ray.cpus_per_worker > cores:
        raise ValueError(
            f"ray.cpus_per_worker = {ray.cpus_per_worker} is more than the {cores} cores of this "
            f"machine: give at most {cores}"
        )


def memory_lines(experiment: Experiment) -> list[str]:
    """Return the memory that a worker and a node need, in lines; no weight is read.

    Raises:
        ValueError: If it cannot fit; one line with what is needed, what is available, and a remedy.
    """
    config, held_models = experiment.config, []
    for subject in range(len(experiment.subjects)):
        folder = folder_of(experiment.subjects[subject].model)
        if folder is None:
            return [
                f"memory: unknown, because the config of model "
                f"{experiment.subjects[subject].model} is not on this machine"
            ]
        held_models.append(_held(experiment, subject, folder))
    needs = needs_of(
        held_models,
        experiment.leaves,
        experiment.memory,
        keeps_scores=any(task.pattern is None for task in experiment.tasks)
        or len(experiment.tasks) > len(experiment.subjects),
        on_gpu=config.ray.gpus_per_worker > 0,
        by_ray=config.ray.workers != 0,
    )
    lines = [
        f"memory: {role} has windows: null: the hidden states of a whole text are not counted"
        for role in ("calibration", *(("fitness",) if config.search.objective == "kl" else ()))
        if any(texts[role].windows is None for texts in experiment.texts)
    ]
    lines += [device_line(needs, _device_memory(config))] if needs.device else []
    return lines + host_lines(needs, workers_here(config), psutil.virtual_memory().available)


def folder_of(model: str) -> str | None:
    """Return the folder of a model's config on this machine; None if it is not here."""
    if model == models.EMBEDDED or Path(model).is_dir():
        return model
    cached = models.cached_config(model)
    return str(cached.parent) if cached else None


def _held(experiment: Experiment, subject: int, folder: str) -> Held:
    texts, dtype = experiment.texts[subject], experiment.subjects[subject].dtype
    calibration, fitness = texts["calibration"], texts["fitness"]
    keeps_states = experiment.config.search.objective == "kl"
    return Held(
        model=models.skeleton(models.load_config(folder), models.DTYPES[dtype]),
        dtype=dtype,
        calibration=calibration.windows or 0,
        calibration_length=calibration.length,
        longest=max(text.length for role, text in texts.items() if role != "calibration"),
        kept_tokens=keeps_states * (fitness.windows or 0) * fitness.length,
    )


def _device_memory(config: Config) -> float | None:
    """Return a worker's GPU memory in bytes; None if there is no GPU here and none is stated."""
    ray = config.ray
    stated = None if ray.gpu_memory is None else ray.gpu_memory * GIB
    measured = None
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        measured = min(torch.cuda.get_device_properties(i).total_memory for i in devices)
    # A cluster's workers may have other GPUs than this machine.
    whole = measured or stated if ray.address == "local" else stated or measured
    return whole and whole * min(1.0, ray.gpus_per_worker)


def workers_here(config: Config) -> int | None:
    """Return how many workers this machine will have; None if they run on a cluster."""
    ray = config.ray
    if ray.workers == 0:
        return 1
    if ray.address != "local":
        return None
    if ray.gpus_per_worker:
        room = max(1, int(torch.cuda.device_count() // ray.gpus_per_worker))
        return min(ray.workers or room, room)
    return ray.workers or max(1, (os.cpu_count() or 1) // ray.cpus_per_worker)
