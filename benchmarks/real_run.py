"""Shared by benchmarks: a finished or running search, with its evaluator and its candidates."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import typer
from safetensors.torch import load_file

from prunevolve.configs import schema
from prunevolve.search.evolution import Evolution
from prunevolve.search.experiment import resolve
from prunevolve.search.fingerprint import Probe
from prunevolve.search.fitness import Evaluator, Setup
from prunevolve.search.population import Candidate, Record, State
from prunevolve.search.prepare import fingerprints
from prunevolve.search.scale import Scale

WATCH = "PRUNEVOLVE_WATCH"
"""The variable of the environment with a log's name and a pace; see `watching`."""


class RealRun:
    """A run folder, which is read but never written to.

    Args:
        path: The folder.
        overrides: Changes of its config, as `key.path=value`.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        if not (path / "scale.json").is_file():
            raise typer.BadParameter(f"{path} has no scale.json: name a run that has candidates")
        self.path = path
        self.experiment = resolve(schema.load(path / "config.yaml", overrides)).read_texts()
        # A run in progress may be writing its last line.
        journal = (path / "journal.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
        self.records = [Record.from_dict(json.loads(line)) for line in journal.splitlines()]
        probes = [
            Probe.from_tensors(load_file(path / f"probe{subject or ''}.safetensors"))
            for subject in range(len(self.experiment.subjects))
        ]
        self.fingerprints = fingerprints(self.experiment, probes)

    def evolution(self) -> Evolution:
        """Return the run's search as it was before its first candidate."""
        return Evolution(
            self.experiment.breeder, self.experiment.weights, self.fingerprints, State()
        )

    def evaluator(self, setup: Setup) -> Evaluator:
        """Return an evaluator with the run's statistics and scale."""
        evaluator = Evaluator(setup)
        for subject in range(len(self.experiment.subjects)):
            statistics = load_file(self.path / f"statistics{subject or ''}.safetensors")
            evaluator.use_statistics(subject, statistics)
        evaluator.use_scale(Scale.model_validate_json((self.path / "scale.json").read_bytes()))
        return evaluator

    def candidates(self) -> list[Candidate]:
        """Return the candidates as workers received them, with their thresholds."""
        evolution, states, candidates = self.evolution(), [State()], []
        search, near = evolution.search, evolution.near
        for record in self.records:
            state = states[max(0, record.index - search.lag)]
            candidate = record.candidate
            measured = record.outcome.kind in ("evaluated", "stopped")
            candidates.append(state.limited(candidate, search, near) if measured else candidate)
            states.append(states[-1].commit(record, search, near))
        return candidates


def watching(log: Path, pace: str) -> dict[str, str]:
    """Return the environment of workers that `watched_search.py` watches.

    Args:
        log: File for their evaluations.
        pace: PACE of `watched_search.py`.
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    return {WATCH: f"{log.absolute()} {pace}", "PYTHONPATH": path}


def workers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that are workers of a search, by the title that Ray gives them."""
    workers = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if re.match(r"ray::\S*Worker", "".join(process.cmdline())):
                workers.append(process)
    return sorted(workers, key=lambda worker: worker.pid)
