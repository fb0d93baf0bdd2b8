"""What the benchmarks take from a finished or running search: its evaluator and its candidates."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from safetensors.torch import load_file

from configs import schema
from configs.schema import Config
from search.evolution import Settings, replay, threshold
from search.fingerprint import Fingerprints, Probe
from search.fitness import Evaluator
from search.launch import settings_of, setup_of
from search.plan import load_plan
from search.population import Candidate, Record, State

_NEEDED = ("config.yaml", "journal.jsonl", "probe.safetensors", "statistics.safetensors")


class RealRun:
    """A run folder, read and never written to."""

    def __init__(self, path: Path) -> None:
        if missing := [name for name in _NEEDED if not (path / name).is_file()]:
            raise typer.BadParameter(f"{path} has no {missing[0]}: name a run that has begun")
        self.path = path
        self.config: Config = schema.load(path / "config.yaml", [])
        self.plan = load_plan(self.config)
        # A run that still goes on may be writing its last line.
        whole = (path / "journal.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
        self.records = [Record.from_dict(json.loads(line)) for line in whole.splitlines()]
        probes = [
            Probe.from_tensors(load_file(path / f"probe{subject or ''}.safetensors"))
            for subject in range(len(self.plan.subjects))
        ]
        tasks = [(probes[task.subject], task.target) for task in self.plan.tasks]
        self.fingerprints = Fingerprints(tasks)
        self.settings: Settings = settings_of(self.config, self.fingerprints)

    def evaluator(self, **changes: Any) -> Evaluator:
        """Return an evaluator with the run's statistics; `changes` go over its setup."""
        made = Evaluator(replace(setup_of(self.config, self.plan), **changes))
        for subject in range(len(self.plan.subjects)):
            stored = load_file(self.path / f"statistics{subject or ''}.safetensors")
            made.use_statistics(subject, stored)
        return made

    def states(self) -> dict[int, State]:
        """Return the states by number of committed outcomes."""
        return replay(self.settings.rules, State(), self.records)

    def candidate(self, record: Record, states: dict[int, State]) -> Candidate:
        """Return a record's candidate as it was given to a worker, with its threshold."""
        candidate = Candidate(
            record.index, record.metric, record.group, record.parents, record.fingerprint
        )
        state = states[max(0, record.index - self.settings.rules.lag)]
        return replace(candidate, stop_above=threshold(candidate, state, self.settings.rules))
