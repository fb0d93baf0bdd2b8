"""What a search will run, and where: the plan of `run_search.py --validate`.

Whatever a run would refuse before its first measurement is refused here, too; no weight is read,
and of a model from the hub no more than config and tokenizer.
"""

import os
from collections.abc import Iterator

import torch

from prunevolve.command_line import require
from prunevolve.configs.schema import Config, Ray
from prunevolve.pruning.models import DTYPES, load_config, skeleton
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.resident import Subject

_LEAST_LAG, _GOOD_LAG = 4, 16
"""Lags for each worker: with less than the first they wait for one another even if evaluations take
about the same time; with the second 95% work though one in ten takes ten times as long."""


def plan_of(config: Config) -> list[str]:
    """Return the plan of a search in lines.

    Raises:
        ValueError: If a run would be refused; one line.
    """
    experiment = check(config)
    lines = [*experiment.notes, *_text_lines(experiment), *_task_lines(experiment)]
    lines.append(_worker_line(config.ray))
    workers = _workers_here(config.ray) or config.ray.workers or 0
    if warning := lag_warning(config.search.lag, workers):
        lines.append(f"warning: {warning}")
    return lines


def check(config: Config) -> Experiment:
    """Check what a run needs and return its experiment.

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
        require("trackers", "tensorboard")
    return experiment


def lag_warning(lag: int, workers: int) -> str:
    """Return what is wrong with a lag for so many workers; empty if nothing is."""
    if workers < 2 or lag >= _LEAST_LAG * workers:
        return ""
    return (
        f"search.lag = {lag} is small for {workers} workers, which will wait for one another: in a "
        f"new run set search.lag={_GOOD_LAG * workers}, {_GOOD_LAG} for each; see docs/CLUSTER.md"
    )


def _text_lines(experiment: Experiment) -> Iterator[str]:
    """Yield the models, then their texts; tokens are counted where text and model are here."""
    yield from map(_model_line, experiment.subjects)
    here = experiment.count_tokens_here()
    for subject, texts, counts in zip(experiment.subjects, experiment.texts, here, strict=True):
        of = f" of {subject.model}" if len(experiment.texts) > 1 else ""
        for role, text in texts.items():
            kinds = " + ".join(f"{part.corpus} {part.split}" for part in text.parts)
            count = counts.get(role, (text.windows or 0) * text.length)
            size = f"{count:,} tokens" if count else "all of it"
            yield f"text {role}{of}: {kinds}: {size}, windows of {text.length}"


def _model_line(subject: Subject) -> str:
    model = skeleton(load_config(subject.model), DTYPES[subject.dtype])
    return f"model {subject.model}: {model.num_parameters():,} parameters in {subject.dtype}"


def _task_lines(experiment: Experiment) -> Iterator[str]:
    candidates = experiment.config.search.candidates
    for task in experiment.tasks:
        pattern = task.pattern.name if task.pattern else "unstructured"
        use = f"{candidates:,} candidates, weight {task.weight:g}"
        if not task.weight:
            use = "only to choose the winner"
        yield f"task {task.name}: {task.sparsity:.1%} zeros, {pattern}, {use}"


def _worker_line(ray: Ray) -> str:
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
