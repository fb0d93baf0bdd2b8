"""Before the first candidate: statistics, probes, the scale, and is it still the same experiment.

A run notes in `environment.json` what identifies it, and a continuation is compared with that.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from configs.schema import Config
from pruning.baselines import BASELINES
from search.baseline_losses import scale_of
from search.evolution import first_foreign
from search.experiment import Experiment
from search.fingerprint import Fingerprints, Probe, tensors_digest
from search.journal import FolderError, RunFolder
from search.pool.pool import Pool
from search.pool.requests import (
    CollectStatistics,
    ProbeTensors,
    TimeFirstStage,
    UseScale,
    UseStatistics,
)
from search.population import Record
from search.scale import Scale
from search.screen import step

SCALE = "scale.json"

FREE_KEYS = (
    "search.candidates",
    "ray.",
    "memory.master",
    "memory.scores",
    "statistics",
    "trackers",
)
"""Config keys that may differ when a run is continued: how long and where, never what."""


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
    return Fingerprints(
        [(probes[task.subject], task.target) for task in experiment.tasks if task.weight]
    )


def _statistics(
    folder: RunFolder, experiment: Experiment, subject: int, pool: Pool, console: Console
) -> dict[str, Tensor]:
    """Return a model's statistics, after giving them to all workers."""
    name = f"statistics{subject or ''}.safetensors"
    statistics = folder.read_tensors(name)
    if statistics is None:
        tokens = experiment.provenance(subject)["calibration"]["tokens"]
        model = experiment.subjects[subject].model
        kept = _kept_name(experiment, subject, pool)
        statistics = folder.read_tensors(kept) if kept else None
        if statistics is None:
            with step(console, f"collecting statistics of {model} on {tokens} tokens") as progress:
                (statistics,) = pool.ask([CollectStatistics(subject, progress.at)])
            if kept:
                folder.write_tensors(kept, statistics)
        folder.write_tensors(name, statistics)
    pool.prepare(UseStatistics(subject, statistics))
    return statistics


def _kept_name(experiment: Experiment, subject: int, pool: Pool) -> str:
    """Return the file in which other runs find these statistics; empty if none are kept.

    Raises:
        FolderError: If the folder that the config names cannot be made.
    """
    config = experiment.config
    if config.statistics is None:
        return ""
    depends_on = [
        pool.model_digest(subject),
        tensors_digest({"calibration": experiment.windows[subject]["calibration"].tokens}),
        experiment.subjects[subject].dtype,
        config.memory.statistics,
        sorted(experiment.leaves),
    ]
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    kept = Path(config.statistics).expanduser().absolute()
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"statistics {config.statistics!r} cannot be made: {error}") from error
    return str(kept / f"{digest}.safetensors")


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
        title = "measuring the dense model and the named metrics on the fitness text"
        count = len(setup.tasks_of("fitness")) * (1 + len(BASELINES))
        tasks = range(len(setup.tasks)) if len(setup.tasks) > 1 else ()
        with step(console, title, count) as progress:
            seconds = pool.ask([TimeFirstStage(task) for task in tasks])
            with pool.counting(progress.advance):
                scale = scale_of(setup, pool.ask, seconds=seconds)
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


# The same experiment


def is_free(key: str) -> bool:
    """Return whether a config key may differ when a run is continued."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def check_config(folder: RunFolder, config: Config, records: int) -> None:
    """Compare a config with the one that the run began with, before any work.

    Raises:
        FolderError: If they differ in more than `FREE_KEYS`, or if `environment.json` is malformed,
            or missing although there is a journal.
    """
    noted = _noted(folder, "config")
    if noted is None:
        if records:
            raise FolderError(
                f"{folder.path} has a journal and no environment.json: the config that it was made "
                "with is unknown; start a new run, perhaps with search.seeds from this one"
            )
        return
    written = config.model_dump(mode="json")  # as it was when the run began: a list for a tuple
    before, now = (dict(_leaves(tree)) for tree in (noted, written))
    for key in sorted(before):  # a newer key's default is the old behaviour
        if before[key] != now.get(key) and not is_free(key):
            raise FolderError(
                f"{key} is {now.get(key)!r} in {folder.path / 'config.yaml'} but was "
                f"{before[key]!r} when the run began: restore it, or start a new run"
            )


def check_fingerprints(
    folder: RunFolder, experiment: Experiment, now: Mapping[str, list[object]]
) -> None:
    """Compare models, texts, statistics and probes with the run's, or record them in a new run.

    Raises:
        FolderError: If they differ.
    """
    before = _noted(folder, "fingerprints")
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


def check_records(
    folder: RunFolder, experiment: Experiment, marks: Fingerprints, records: list[Record]
) -> None:
    """Raise FolderError if the journal begins with candidates that this search does not breed."""
    if foreign := first_foreign(experiment.breeder, experiment.weights, marks, records):
        raise FolderError(
            f"{folder.path / 'journal.jsonl'} line {foreign.index + 1} is not what this run's "
            "settings breed: it is another run's journal"
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


def _noted(folder: RunFolder, key: str) -> dict[str, object] | None:
    """Return an object that `environment.json` holds; None if there is no such file."""
    if not (folder.path / "environment.json").exists():
        return None
    value = folder.read_json("environment.json", "config", "fingerprints")[key]
    if not isinstance(value, dict):
        raise FolderError(f"{key} in {folder.path / 'environment.json'} must be an object")
    return value


def _leaves(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested mappings by dotted path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
