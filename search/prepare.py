"""Before the first candidate: what identifies the run, its statistics, probes and scale."""

import hashlib
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib import metadata

import torch
from rich.console import Console
from torch import Tensor

from prunevolve.configs.schema import Config
from prunevolve.pruning.model_name import hub_id
from prunevolve.pruning.models import find_model
from prunevolve.pruning.progress import step
from prunevolve.search.experiment import Experiment
from prunevolve.search.fingerprint import Fingerprints, Probe, tensors_digest
from prunevolve.search.plan import work_after
from prunevolve.search.pool.pool import Pool
from prunevolve.search.pool.worker import code_digest
from prunevolve.search.run_folder import FolderError, RunFolder
from prunevolve.search.scale import scale_of, wanted_of

MUTABLE: Mapping[str, bool | set[str]] = {
    "search": {"candidates", "hours"},
    "ray": True,
    "low_memory": True,
    "tensorboard": True,
}
"""Config keys that may differ when a run is continued: how long and where, never what.

Statistics that the run has are used as they are, also with another `low_memory`.
"""

_HEAD = 2**24  # bytes of a weights file that its digest reads: names and shapes come first


def prepare(
    folder: RunFolder, experiment: Experiment, pool: Pool, console: Console
) -> Fingerprints:
    """Get statistics, probes and scale from the folder or workers, and give them to all workers."""
    with step(console, "starting the first worker"):
        pool.start()
    models = ", ".join(subject.model for subject in experiment.subjects)
    tokens = sum(subject.tokens["calibration"].numel() for subject in experiment.subjects)
    console.print(f"statistics of {models} on {tokens} tokens")
    kept = _kept(folder, experiment, pool, "statistics", "collect_statistics")
    for number, statistics in enumerate(kept):
        pool.use_statistics(number, statistics)
    kept = _kept(folder, experiment, pool, "probe", "probe_tensors")
    probes = [*map(Probe.from_tensors, kept)]
    wanted, began = wanted_of(experiment, "fitness"), time.monotonic()
    new = sum(x not in pool.measured for x in wanted)
    scale = scale_of(experiment, "fitness", pool.losses("dense model and baselines", wanted))
    pool.use_scale(scale)
    if new:
        after = work_after(experiment)
        seconds = round((time.monotonic() - began) / new * after)
        took = f"some {timedelta(seconds=seconds)} at the speed of these"
        console.print(f"after the candidates: up to {after} measurements, {took}")
    return fingerprints(experiment, probes)


def _kept(
    folder: RunFolder, experiment: Experiment, pool: Pool, kind: str, method: str
) -> Iterator[dict[str, Tensor]]:
    """Yield each model's tensors of a kind, from files in the folder; those that are not there are
    made by a method of `Evaluator`, side by side.
    """
    files = [f"{kind}{n or ''}.safetensors" for n in range(len(experiment.subjects))]
    missing = [n for n, file in enumerate(files) if not (folder.path / file).exists()]
    for number, tensors in pool.tensors(method, missing):
        folder.write_tensors(files[number], tensors)
    yield from map(folder.read_tensors, files)  # one at a time


def fingerprints(experiment: Experiment, probes: Sequence[Probe]) -> Fingerprints:
    """Return the fingerprints of the tasks that count, given a probe of each model."""
    tasks, subject_of = experiment.tasks_of("fitness"), experiment.subject_of
    return Fingerprints([(probes[subject_of[t]], partial(experiment.target, t)) for t in tasks])


# What identifies a run


def write_environment(folder: RunFolder, experiment: Experiment) -> None:
    """Write `environment.json`, once: the machine where the run began, and its `identity`."""
    if (folder.path / "environment.json").exists():
        return
    packages = ("torch", "transformers", "deap", "ray", "numpy", "tokenizers")
    machine = {
        "python": platform.python_version(),  # and so that of the embedded text, which is its own
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
    }
    folder.write_json("environment.json", {**machine, "identity": identity(experiment)})


def identity(experiment: Experiment) -> dict[str, object]:
    """Return what must be the same when a run is continued, as JSON; no worker is needed."""
    models = {subject.model for subject in experiment.subjects}
    return {
        **settings(experiment.config),
        "files of models": {model: _files_digest(model) for model in sorted(models)},
        "tokens of texts": [tensors_digest(subject.tokens) for subject in experiment.subjects],
        "code": code_digest(),
    }


def settings(config: Config) -> dict[str, object]:
    """Return the part of an `identity` that a config alone says."""
    return config.model_dump(mode="json", exclude=MUTABLE)


def check_identity(folder: RunFolder, now: Mapping[str, object]) -> None:
    """Raise FolderError if an `identity`, or its `settings`, is not that of a folder's run."""
    environment = folder.read_json("environment.json", "identity")
    if difference := next(_differences(environment["identity"], now), ""):
        python, here = environment.get("python"), platform.python_version()
        why = f" on Python {python}, this is {here}" if python not in (None, here) else ""
        problem = f"{difference} when the run in {folder.path} began{why}"
        raise FolderError(f"{problem}: restore it, or start a new run")


def _differences(before: object, now: Mapping[str, object], path: str = "") -> Iterator[str]:
    """Yield where nested mappings differ from what was before, by dotted path."""
    for key, value in now.items():
        was = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict):
            yield from _differences(was, value, f"{path}{key}.")
        elif was != value:
            yield f"{path}{key} is {value!r:.200} but was {was!r:.200}"


def _files_digest(model: str) -> str:
    """Return a hash of a model's config and weights; the commit of one from the hub says it all."""
    if hub := hub_id(model):
        return str(hub[1])
    folder, digest = find_model(model), hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HEAD))
    return digest.hexdigest()[:16]
