"""Shared by benchmarks: a finished or running search, with its evaluator."""

from collections.abc import Sequence
from pathlib import Path

import typer
from safetensors.torch import load_file
from torch import Tensor

from prunevolve.configs import schema
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.evolution import Evolution, State
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.fingerprint import Probe
from prunevolve.search.prepare import fingerprints
from prunevolve.search.run_folder import RunFolder
from prunevolve.search.scale import scale_of


class RealRun:
    """A run folder, which is read but never written to.

    Overrides change its config, as `key.path=value`.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        if not (path / "losses.jsonl").is_file():
            raise typer.BadParameter(f"{path} has no losses.jsonl: name a run that has candidates")
        self._path = path
        self.experiment = resolve(schema.load(path / "config.yaml", overrides)).read_texts()
        self.records = RunFolder.look(path).records()
        self.fingerprints = fingerprints(
            self.experiment, [Probe.from_tensors(tensors) for tensors in self._tensors("probe")]
        )

    def evolution(self) -> Evolution:
        """Return the run's search as it was before its first candidate."""
        return Evolution(self.experiment.breeder, self.fingerprints, State())

    def evaluator(self, experiment: Experiment) -> Evaluator:
        """Return an evaluator with the run's statistics and scale."""
        evaluator = Evaluator(experiment)
        for subject, statistics in enumerate(self._tensors("statistics")):
            evaluator.residents[subject].use_statistics(statistics)
        known = RunFolder.look(self._path).losses()
        evaluator.scale = scale_of(experiment, "fitness", known)
        return evaluator

    def _tensors(self, name: str) -> list[dict[str, Tensor]]:
        """Return what the run has kept under this name for each of its models."""
        subjects = range(len(self.experiment.subjects))
        return [load_file(self._path / f"{name}{number or ''}.safetensors") for number in subjects]
