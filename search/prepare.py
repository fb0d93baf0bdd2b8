"""Preparation before the first candidate: statistics, probes and the scale of the fitness."""

import hashlib
import json
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import Tensor

from pruning.baselines import BASELINES
from search.baseline_losses import scale_of
from search.experiment import Experiment
from search.fingerprint import Fingerprints, tensors_digest
from search.journal import FolderError, RunFolder
from search.pool.pool import Pool
from search.pool.requests import (
    CollectStatistics,
    ProbeTensors,
    TimeFirstStage,
    UseScale,
    UseStatistics,
)
from search.probe import Probe
from search.resume_checks import check_fingerprints
from search.scale import Scale
from search.screen import step

SCALE = "scale.json"


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
                (collected,) = pool.ask([CollectStatistics(subject, progress.at)])
                statistics = dict(collected)
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
        (tensors,) = pool.ask([ProbeTensors(subject)])
        probe = dict(tensors)
        folder.write_tensors(name, probe)
    return probe


def _scale(folder: RunFolder, experiment: Experiment, pool: Pool, console: Console) -> Scale:
    """Return the scale of the fitness, after giving it to all workers."""
    scale = read_scale(folder)
    if scale is None:
        setup = experiment.setup
        title = "measuring the dense model and the named metrics on the fitness text"
        with step(
            console, title, len(setup.tasks_of("fitness")) * (1 + len(BASELINES))
        ) as progress:
            tasks = range(len(setup.tasks)) if len(setup.tasks) > 1 else ()
            seconds = pool.ask([TimeFirstStage(task) for task in tasks])
            ask = partial(pool.ask, done=progress.advance)
            scale = scale_of(setup, ask, seconds=seconds)
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
