"""This machine: its description, and whether it has the cores and memory that workers need."""

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil
import torch

from configs.schema import Config, Ray
from pruning import models
from pruning.sizes import (
    GIB,
    Rows,
    WorkerNeeds,
    in_words,
    size_text,
    sizes_of,
    worker_needs,
)
from search.experiment import ResolvedConfig


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


def memory_lines(resolved: ResolvedConfig) -> list[str]:
    """Return the memory that a worker and a node need, in lines; no weight is read.

    Raises:
        ValueError: If it cannot fit; one line with what is needed, what is available, and a remedy.
    """
    config, memory = resolved.config, resolved.config.memory
    sizes = []
    for subject, texts in zip(resolved.subjects, resolved.texts, strict=True):
        folder = folder_of(subject.model)
        if folder is None:
            return [
                f"memory: unknown, because the config of model {subject.model} is not on this "
                "machine"
            ]
        model = models.skeleton(models.load_config(folder), models.DTYPES[subject.dtype])
        evaluated = max(x.length for role, x in texts.items() if role != "calibration")
        sizes.append(
            sizes_of(
                model,
                subject.dtype,
                subject.dtype,
                resolved.leaves,
                calibration=(texts["calibration"].windows or 0, texts["calibration"].length),
                evaluation=(0, evaluated),
                statistics_dtype=memory.statistics,
            )
        )
    needs_again = any(task.pattern is None for task in resolved.tasks)
    needs_again |= len(resolved.tasks) > len(resolved.subjects)
    needs = worker_needs(
        sizes,
        keeps_scores=memory.scores == "keep" and needs_again,
        master_on_host=memory.master == "host",
        on_gpu=config.ray.gpus_per_worker > 0,
        by_ray=config.ray.workers != 0,
    )
    lines = []
    if any(texts["calibration"].windows is None for texts in resolved.texts):
        lines.append("memory: calibration has windows: null: its hidden states are not counted")
    if needs.device:
        lines.append(_device_line(needs.device, _device_memory(config)))
    return lines + _host_lines(needs, workers_here(config), psutil.virtual_memory().available)


def _device_line(device: Rows, available: float | None) -> str:
    """Return a worker's device memory; raise ValueError if that is more than is available."""
    total, parts = sum(device.values()), in_words(device)
    if available is not None and total > available:
        raise ValueError(
            f"a worker's device must have {size_text(total, up=True)} ({parts}), got "
            f"{size_text(available)}: set memory.scores=recompute, memory.statistics=bfloat16 or "
            "memory.master=host, or take a smaller dtype or shorter windows"
        )
    limit = "an unknown size: state ray.gpu_memory"
    if available is not None:
        limit = size_text(available)
    return f"memory: device of a worker {size_text(total)} of {limit}: {parts}"


def _host_lines(needs: WorkerNeeds, workers: int | None, available: float) -> list[str]:
    """Return the memory of a node's host; raise ValueError if workers here do not fit."""
    per_worker, per_node = sum(needs.worker.values()), sum(needs.node.values())
    lines = [
        f"memory: host of a worker {size_text(per_worker)}: {in_words(needs.worker)}",
        f"memory: host of a node {size_text(per_node)} plus its workers: {in_words(needs.node)}",
    ]
    if workers is None:
        return lines
    total, free = per_node + workers * per_worker, size_text(available)
    noun = "worker" if workers == 1 else "workers"
    if total > available:
        raise ValueError(
            f"this machine must have {size_text(total, up=True)} free for {workers} {noun} "
            f"({size_text(per_worker)} each, and {in_words(needs.node)}), got {free}: lower "
            "ray.workers, take fewer calibration windows, a smaller dtype or model"
        )
    return [*lines, f"memory: host with {workers} {noun} {size_text(total)} of {free}"]


def folder_of(model: str) -> str | None:
    """Return the folder of a model's config on this machine; None if it is not here."""
    if model == models.EMBEDDED or Path(model).is_dir():
        return model
    cached = models.cached_config(model)
    return str(cached.parent) if cached else None


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
