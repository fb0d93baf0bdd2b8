"""What a search needs of this machine: cores, memory, and the plan of `run_search.py --validate`.

Whatever a run would refuse before its first measurement is refused here, too; no weight is read,
and of a model from the hub no more than config and tokenizer.
"""

import json
import os
from collections.abc import Iterator
from textwrap import wrap

import psutil
import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from prunevolve import extras
from prunevolve.configs.schema import Config, Ray
from prunevolve.pruning import models
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.sizes import (
    GIB,
    Rows,
    Work,
    WorkerNeeds,
    in_words,
    size_text,
    sizes_of,
    worker_needs,
)
from prunevolve.pruning.store import BATCH_TOKENS
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.population import FINALISTS
from prunevolve.search.resident import Subject

_LEAST_LAG, _GOOD_LAG = 4, 16
"""Lags for each worker: with less than the first they wait for one another even if evaluations take
about the same time; with the second 95% work though one in ten takes ten times as long."""


def plan_of(config: Config) -> list[str]:
    """Return the plan of a search in lines.

    Raises:
        ValueError: If a run would be refused; one line.
    """
    experiment, memory = check(config)
    return [
        *experiment.notes,
        *_text_lines(experiment, experiment.count_tokens_here()),
        *_task_lines(experiment),
        _worker_line(config),
        *_lag_lines(config),
        *memory,
        _evaluations_line(experiment),
        *_folded(f"keys at their defaults: {', '.join(_defaults(config)) or 'none'}"),
    ]


def check(config: Config) -> tuple[Experiment, list[str]]:
    """Check what a run needs; return its experiment, and the memory that it takes, in lines.

    Raises:
        ValueError: If a run would be refused; one line.
    """
    experiment = resolve(config)
    ray, cores = config.ray, os.cpu_count() or 1
    if (ray.workers == 0 or ray.address == "local") and ray.cpus_per_worker > cores:
        raise ValueError(
            f"ray.cpus_per_worker = {ray.cpus_per_worker} is more than the {cores} cores of this "
            f"machine: give at most {cores}"
        )
    if config.tensorboard:
        extras.require("trackers", "tensorboard")
    return experiment, memory_lines(experiment)


def _skeleton(subject: Subject) -> PreTrainedModel:
    """Return a model without its weights."""
    return models.skeleton(models.load_config(subject.model), models.DTYPES[subject.dtype])


# Memory


def memory_lines(experiment: Experiment) -> list[str]:
    """Return the memory that a worker and a node need, in lines; no weight is read.

    Raises:
        ValueError: If it cannot fit; one line with what is needed, what is available, and a remedy.
    """
    config, memory, tasks = experiment.config, experiment.config.memory, experiment.tasks
    sizes = []
    for subject, texts in zip(experiment.subjects, experiment.texts, strict=True):
        model = _skeleton(subject)
        evaluated = (x.length for role, x in texts.items() if role != "calibration")
        work = Work(
            subject.dtype,
            subject.dtype,
            experiment.leaves,
            calibration=(texts["calibration"].windows or 0, texts["calibration"].length),
            evaluation=(0, max(BATCH_TOKENS, *evaluated)),
            statistics_dtype=memory.statistics,
        )
        sizes.append(sizes_of(model, work))
    needs_again = any(task.pattern is None for task in tasks) or len(tasks) > len(sizes)
    needs = worker_needs(
        sizes,
        keeps_scores=memory.scores == "keep" and needs_again,
        master_on_host=memory.master == "host",
        on_gpu=config.ray.gpus_per_worker > 0,
        by_ray=config.ray.workers != 0,
    )
    lines = []
    if any(texts["calibration"].windows is None for texts in experiment.texts):
        lines.append("memory: calibration has windows: null: its hidden states are not counted")
    if needs.device:
        lines.append(_device_line(needs.device, _device_memory(config.ray)))
    return lines + _host_lines(needs, _workers_here(config.ray), psutil.virtual_memory().available)


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
        most = int((available - per_node) // per_worker)
        fit = f"set ray.workers to {most} at most, or " if most > 0 else ""
        raise ValueError(
            f"this machine must have {size_text(total, up=True)} free for {workers} {noun} "
            f"({size_text(per_worker)} each, and {in_words(needs.node)}), got {free}: {fit}"
            "take fewer calibration windows, a smaller dtype or model"
        )
    return [*lines, f"memory: host with {workers} {noun} {size_text(total)} of {free}"]


def _device_memory(ray: Ray) -> float | None:
    """Return a worker's GPU memory in bytes; None if there is no GPU here and none is stated."""
    stated = None if ray.gpu_memory is None else ray.gpu_memory * GIB
    measured = None
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        measured = min(torch.cuda.get_device_properties(i).total_memory for i in devices)
    # A cluster's workers may have other GPUs than this machine.
    whole = measured or stated if ray.address == "local" else stated or measured
    return whole and whole * min(1.0, ray.gpus_per_worker)


def _workers_here(ray: Ray) -> int | None:
    """Return how many workers this machine will have; None if they run on a cluster."""
    if ray.workers == 0:
        return 1
    if ray.address != "local":
        return None
    if ray.gpus_per_worker:
        room = max(1, int(torch.cuda.device_count() // ray.gpus_per_worker))
        return min(ray.workers or room, room)
    return ray.workers or max(1, (os.cpu_count() or 1) // ray.cpus_per_worker)


# The other lines of the plan


def _text_lines(experiment: Experiment, here: list[dict[str, int]]) -> Iterator[str]:
    """Yield the models, then their texts; `here` has the tokens of those that are at hand."""
    for subject in experiment.subjects:
        model = _skeleton(subject)
        count = sum(int(parameter.numel()) for parameter in model.parameters())
        size = size_text(count * models.DTYPES[subject.dtype].itemsize)
        yield f"model {subject.model}: {count:,} parameters, {size} in {subject.dtype}"
    for subject, texts, counts in zip(experiment.subjects, experiment.texts, here, strict=True):
        of = f" of {subject.model}" if len(experiment.texts) > 1 else ""
        for role, text in texts.items():
            kinds = " + ".join(f"{part.corpus} {part.split}" for part in text.parts)
            count = counts.get(role, (text.windows or 0) * text.length)
            size = f"{count:,} tokens" if count else "all of it"
            yield f"text {role}{of}: {kinds}: {size}, windows of {text.length}"


def _task_lines(experiment: Experiment) -> Iterator[str]:
    for task in experiment.tasks:
        pattern = task.pattern.name if task.pattern else "unstructured"
        use = f"weight {task.weight:g}" if task.weight else "only to choose the winner"
        yield f"task {task.name}: {task.sparsity:.1%} zeros, {pattern}, {use}"


def _worker_line(config: Config) -> str:
    ray = config.ray
    share = f"{ray.cpus_per_worker} cores" if ray.cpus_per_worker > 1 else "1 core"
    if ray.gpus_per_worker:
        share += f" and {ray.gpus_per_worker:g} GPU"
    workers = _workers_here(ray)
    if workers is None:
        most = "as many as fit" if ray.workers is None else f"up to {ray.workers}"
        return f"workers: {most} on the cluster {ray.address!r}, {share} each"
    gpus = f" and {torch.cuda.device_count()} GPUs" if ray.gpus_per_worker else ""
    place = "in this process" if ray.workers == 0 else "here"
    return f"workers: {workers} {place}, {share} each, of {os.cpu_count()} cores{gpus}"


def lag_warning(lag: int, workers: int) -> str:
    """Return what is wrong with a lag for so many workers; empty if nothing is."""
    if workers < 2 or lag >= _LEAST_LAG * workers:
        return ""
    return (
        f"search.lag = {lag} is small for {workers} workers, which will wait for one another: in a "
        f"new run set search.lag={_GOOD_LAG * workers}, {_GOOD_LAG} for each; see docs/CLUSTER.md"
    )


def _lag_lines(config: Config) -> list[str]:
    workers = _workers_here(config.ray) or config.ray.workers or 0
    warning = lag_warning(config.search.lag, workers)
    return [f"warning: {warning}"] if warning else []


def _evaluations_line(experiment: Experiment) -> str:
    """Return the number of evaluations."""
    candidates, named = experiment.config.search.candidates, len(BASELINES)
    return (
        f"evaluations: {candidates} candidates and {named} named metrics on fitness, "
        f"{min(FINALISTS, candidates)} finalists and {named} on selection, 1 and {named} on "
        f"report, for each of {len(experiment.tasks)} "
        f"{'task' if len(experiment.tasks) == 1 else 'tasks'}"
    )


def _folded(text: str) -> list[str]:
    return wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _defaults(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the keys that a config does not set, with their default values."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from _defaults(value, f"{prefix}{key}.")
        elif key not in section.model_fields_set:
            shown = json.dumps(value) if value is None or isinstance(value, bool) else value
            yield f"{prefix}{key}={shown}"
