"""Before the first candidate: statistics, probes, and what candidates are compared with.

A run notes in `environment.json` what identifies it, and a continuation is compared with that.
"""

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

import torch
from rich.console import Console
from torch import Tensor

from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.progress import counted, step
from prunevolve.search.experiment import Experiment
from prunevolve.search.fingerprint import Fingerprints, Probe, tensors_digest
from prunevolve.search.fitness import Setup
from prunevolve.search.journal import FolderError, RunFolder
from prunevolve.search.pool.pool import Pool
from prunevolve.search.pool.requests import (
    CollectStatistics,
    ProbeTensors,
    UseScale,
    UseStatistics,
)
from prunevolve.search.scale import Cell, Scale, cell_of

SCALE = "scale.json"

Ask = Callable[[Sequence[tuple[int, str, Criterion | None]]], Sequence[list[float] | None]]
"""Returns each request's losses by window; None where a criterion is degenerate."""

Losses = dict[str, list[float]]


def prepare(
    folder: RunFolder, experiment: Experiment, pool: Pool, console: Console
) -> Fingerprints:
    """Get statistics, probes and scale, from the folder or workers, and check the environment.

    Raises:
        FolderError: If models, texts or statistics are not those that the run began with.
    """
    digests: dict[str, list[object]] = {
        name: [] for name in ("model", "texts", "windows", "statistics", "probe", "scale")
    }
    probes = []
    with step(console, "starting the first worker"):
        pool.model_digest(0)
    for subject in range(len(experiment.subjects)):
        statistics = _statistics(folder, experiment, subject, pool, console)
        texts = experiment.windows[subject]
        probe = _probe(folder, subject, pool)
        digests["model"].append(pool.model_digest(subject))
        digests["texts"].append({r: w.provenance["text_sha256"] for r, w in texts.items()})
        digests["windows"].append(tensors_digest({r: w.tokens for r, w in texts.items()}))
        digests["statistics"].append(tensors_digest(statistics))
        digests["probe"].append(tensors_digest(probe))
        probes.append(Probe.from_tensors(probe))
    scale = _scale(folder, experiment, pool, console)
    digests["scale"].append(scale.digest())
    check_fingerprints(folder, experiment, digests)
    return fingerprints(experiment, probes)


def fingerprints(experiment: Experiment, probes: Sequence[Probe]) -> Fingerprints:
    """Return the fingerprints of the tasks that count, given a probe of each model."""
    tasks = [task for task in experiment.tasks if task.weight]
    return Fingerprints([(probes[task.subject], task.target) for task in tasks])


def _statistics(
    folder: RunFolder, experiment: Experiment, subject: int, pool: Pool, console: Console
) -> dict[str, Tensor]:
    """Return a model's statistics, after giving them to all workers."""
    name = f"statistics{subject or ''}.safetensors"
    statistics = folder.read_tensors(name)
    if statistics is None:
        tokens = experiment.provenance(subject)["calibration"]["tokens"]
        model = experiment.subjects[subject].model
        with step(console, f"collecting statistics of {model} on {tokens} tokens"):
            (statistics,) = pool.ask([CollectStatistics(subject)])
        folder.write_tensors(name, statistics)
    pool.prepare(UseStatistics(subject, statistics))
    return statistics


def _probe(folder: RunFolder, subject: int, pool: Pool) -> dict[str, Tensor]:
    name = f"probe{subject or ''}.safetensors"
    probe = folder.read_tensors(name)
    if probe is None:
        (probe,) = pool.ask([ProbeTensors(subject)])
        folder.write_tensors(name, probe)
    return probe


def _scale(folder: RunFolder, experiment: Experiment, pool: Pool, console: Console) -> Scale:
    """Return the scale of the fitness, after giving it to all workers."""
    scale = read_scale(folder)
    if scale is None:
        setup = experiment.setup
        total = len(setup.tasks_of("fitness")) * (1 + len(BASELINES))
        with counted(console, "dense and named metrics", total) as count, pool.counting(count):
            scale = scale_of(setup, pool.losses)
        folder.write_json(SCALE, scale.model_dump())
    pool.prepare(UseScale(scale))
    return scale


def read_scale(folder: RunFolder) -> Scale | None:
    """Return the scale in a run folder; None if it has not been measured yet.

    Raises:
        FolderError: If the file is damaged.
    """
    if not (folder.path / SCALE).exists():
        return None
    return folder.read_model(SCALE, Scale)


# What candidates are compared with: the dense model and the named metrics


def losses_of(ask: Ask, task: int, role: str) -> tuple[list[float], Losses]:
    """Return a task's losses by window: dense, and under each named metric that can prune it."""
    criteria = [None, *(baseline.criterion for baseline in BASELINES.values())]
    dense, *measured = ask([(task, role, criterion) for criterion in criteria])
    assert dense is not None
    named = {
        name: losses
        for name, losses in zip(BASELINES, measured, strict=True)
        if losses and all(map(math.isfinite, losses))
    }
    return dense, named


def cells_of(
    setup: Setup, task: int, role: str, dense: Sequence[float], named: Mapping[str, list[float]]
) -> list[Cell]:
    """Return a task's cells on one of its texts, weighted by their numbers of windows."""
    # Tasks of weight 0 are only compared with one another.
    total = sum(setup.tasks[other].weight or 1 for other in setup.tasks_of(role))
    kinds = setup.kinds_of(task, role)
    cells = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        weight = (setup.tasks[task].weight or 1) / total * len(places) / len(kinds)
        cells.append(cell_of(task, kind, weight, places, dense, dict(named)))
    return cells


def scale_of(setup: Setup, ask: Ask, role: str = "fitness") -> Scale:
    """Measure the scale of one of the texts."""
    cells: list[Cell] = []
    for task in setup.tasks_of(role):
        cells += cells_of(setup, task, role, *losses_of(ask, task, role))
    return Scale(cells=tuple(cells))


# What identifies a run


def check_fingerprints(
    folder: RunFolder, experiment: Experiment, now: Mapping[str, list[object]]
) -> None:
    """Compare models, texts, statistics and probes with the run's, or record them in a new run.

    Raises:
        FolderError: If they differ.
    """
    before = noted(folder, "fingerprints")
    if before is None:
        folder.write_json(
            "environment.json",
            {**description(), "config": experiment.config.model_dump(), "fingerprints": dict(now)},
        )
        return
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise FolderError(
                f"the run's {name} had fingerprint {before.get(name)} and has {now.get(name)} "
                f"here: resume with the original {name}, or start a new run"
            )


def description() -> dict[str, object]:
    """Return this machine's versions and devices, as JSON."""
    packages = ("torch", "transformers", "deap", "ray", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
    }


def noted(folder: RunFolder, key: str) -> dict[str, object] | None:
    """Return an object that `environment.json` holds; None if there is no such file."""
    if not (folder.path / "environment.json").exists():
        return None
    value = folder.read_json("environment.json", "config", "fingerprints")[key]
    if not isinstance(value, dict):
        raise FolderError(f"{key} in {folder.path / 'environment.json'} must be an object")
    return value
