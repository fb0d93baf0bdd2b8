"""What identifies the experiment in a run folder, and checks that a continuation matches it."""

from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema import Config
from search.evolution import Marks, first_foreign
from search.experiment import Experiment
from search.journal import FolderError, RunFolder
from search.machine import description
from search.population import Record

FREE_KEYS = (
    "search.candidates",
    "ray.",
    "memory.master",
    "memory.scores",
    "statistics",
    "trackers",
)
"""Config keys that may differ when a run is continued: how long and where, never what."""

Fingerprints = Mapping[str, list[object]]
"""Hashes, one per model, by the name of the thing hashed."""


def is_free(key: str) -> bool:
    """Return whether a config key may differ when a run is continued."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def check_config(folder: RunFolder, config: Config, records: int) -> None:
    """Compare a config with the one that the run began with, before any work.

    Raises:
        FolderError: If they differ in more than `FREE_KEYS`, or if `environment.json` is malformed,
            or missing although there is a journal.
    """
    environment = _environment(folder)
    if environment is None:
        if records:
            raise FolderError(
                f"{folder.path} has a journal and no environment.json: the config that it was made "
                "with is unknown; start a new run, perhaps with search.seeds from this one"
            )
        return
    written = config.model_dump(mode="json")  # as it was when the run began: a list for a tuple
    before, now = (dict(_leaves(part)) for part in (environment["config"], written))
    for key in sorted(before):  # a newer key's default is the old behaviour
        if before[key] != now.get(key) and not is_free(key):
            raise FolderError(
                f"{key} is {now.get(key)!r} in {folder.path / 'config.yaml'} but was "
                f"{before[key]!r} when the run began: restore it, or start a new run"
            )


def check_fingerprints(folder: RunFolder, experiment: Experiment, now: Fingerprints) -> None:
    """Compare models, texts, statistics and probes with the run's, or record them in a new run.

    Raises:
        FolderError: If they differ.
    """
    environment = _environment(folder)
    if environment is None:
        folder.write_json(
            "environment.json",
            {**description(), "config": experiment.config.model_dump(), "fingerprints": dict(now)},
        )
        return
    before = environment["fingerprints"]
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise FolderError(
                f"the run's {name} had fingerprint {before.get(name)} and has {now.get(name)} "
                f"here: resume with the original {name}, or start a new run"
            )


def check_records(
    folder: RunFolder, experiment: Experiment, marks: Marks, records: list[Record]
) -> None:
    """Raise FolderError if the journal begins with candidates that this search does not breed."""
    if foreign := first_foreign(experiment.breeder, experiment.weights, marks, records):
        raise FolderError(
            f"{folder.path / 'journal.jsonl'} line {foreign.index + 1} is not what this run's "
            "settings breed: it is another run's journal"
        )


def _environment(folder: RunFolder) -> dict[str, Any] | None:
    if not (folder.path / "environment.json").exists():
        return None
    environment: dict[str, Any] = folder.read_json("environment.json", "config", "fingerprints")
    for key in ("config", "fingerprints"):
        if not isinstance(environment[key], dict):
            raise FolderError(f"{key} in {folder.path / 'environment.json'} must be an object")
    return environment


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
