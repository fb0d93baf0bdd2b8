"""A finished or running search, from which benchmarks take the evaluator and the candidates."""

import json
from pathlib import Path

import typer
from safetensors.torch import load_file

from configs import schema
from search.evolution import Evolution, limited
from search.experiment import resolve
from search.fingerprint import Fingerprints
from search.fitness import Evaluator, Setup
from search.population import Candidate, Record, State
from search.probe import Probe
from search.scale import Scale

_NEEDED = (
    *("config.yaml", "journal.jsonl", "probe.safetensors", "statistics.safetensors"),
    "scale.json",
)


class RealRun:
    """A run folder, which is read but never written to."""

    def __init__(self, path: Path) -> None:
        if missing := [name for name in _NEEDED if not (path / name).is_file()]:
            raise typer.BadParameter(f"{path} has no {missing[0]}: name a run that has candidates")
        self.path = path
        self.experiment = resolve(schema.load(path / "config.yaml", [])).read_texts()
        # A run in progress may be writing its last line.
        journal = (path / "journal.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
        self.records = [Record.from_dict(json.loads(line)) for line in journal.splitlines()]
        probes = [
            Probe.from_tensors(load_file(path / f"probe{subject or ''}.safetensors"))
            for subject in range(len(self.experiment.subjects))
        ]
        self.fingerprints = Fingerprints(
            [(probes[task.subject], task.target) for task in self.experiment.tasks]
        )

    def evolution(self) -> Evolution:
        """Return the run's search as it was before its first candidate."""
        fingerprints = self.fingerprints if self.experiment.config.search.fingerprint else None
        return Evolution(self.experiment.settings, fingerprints, State())

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
        rules, states, candidates = self.evolution().rules, [State()], []
        for record in self.records:
            state = states[max(0, record.index - rules.lag)]
            candidates.append(limited(record.candidate, state, rules))
            states.append(states[-1].commit(record, rules))
        return candidates
