"""From metric text to outcome: prune, measure, restore; over one task or several.

An `Evaluator` holds its models with everything that a candidate needs, loaded once. Each task is
measured rung by rung (`search.stages`), a few windows first; a candidate that is clearly not the
best is not measured to the end.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest

import torch
from torch import Tensor

from prunevolve.evaluation.perplexity import perplexity
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.experiment import Experiment
from prunevolve.search.fingerprint import take_probe, tensors_digest
from prunevolve.search.records import Candidate, Outcome
from prunevolve.search.resident import Resident, Weights, keep_freed_memory
from prunevolve.search.scale import Scale

SLACK = 0.2
"""A candidate is clearly above the best after n windows if its predicted rise is so by this
fraction over the square root of n."""


class Evaluator:
    """Resident models that evaluate candidates, one after the other.

    Args:
        experiment: What it is built from.
        weights: Each model's weights, if they are already here; the others are loaded.
    """

    def __init__(self, experiment: Experiment, weights: Sequence[Weights | None] = ()) -> None:
        torch.set_num_threads(experiment.config.ray.cpus_per_worker)
        keep_freed_memory()
        self.experiment = experiment
        tasks, low_memory = experiment.subject_of.count, experiment.config.low_memory
        self.residents = [
            Resident(subject, experiment.device, low_memory, tasks(number), given)
            for number, (subject, given) in enumerate(zip_longest(experiment.subjects, weights))
        ]
        self.scale: Scale  # `use_scale` sets it, before the first candidate

    @property
    def seconds(self) -> float:
        """Time that measuring all fitness windows took on the dense models."""
        return sum(resident.seconds for resident in self.residents)

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of those dense weights of the models that get pruned."""
        return tuple(tensors_digest(resident.master) for resident in self.residents)

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Collect a model's statistics and return them by `X/layer`; see `use_statistics`."""
        return self.residents[subject].collect_statistics(self.experiment.terminals)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Prune a model by these statistics from now on."""
        self.residents[subject].use_statistics(tensors)

    def use_scale(self, scale: Scale) -> None:
        """Measure candidates on this scale from now on; it defines the fitness."""
        self.scale = scale

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""
        places = [i for i, other in enumerate(self.experiment.subject_of) if other == subject]
        targets = [self.experiment.target(place, "row") for place in places]
        resident = self.residents[subject]
        return take_probe(resident.master, resident.statistics, resident.store.blocks, targets)

    def evaluate(self, candidate: Candidate) -> Outcome:
        """Prune, measure on the fitness windows rung by rung, and restore."""
        try:
            return self._measure(candidate)
        except DegenerateScores as error:
            # No mask can be made from the scores: the metric's fault, which only all layers show.
            return Outcome("degenerate", reason=str(error))
        finally:
            for resident in self.residents:
                resident.restore()

    def losses(self, task: int, role: str, criterion: Criterion | None) -> list[float] | None:
        """Return each window's mean NLL on a task's text; the dense model's if criterion is None.

        None if the criterion cannot prune this model: it is degenerate, or the perplexity infinite.
        """
        resident = self._resident(task)
        if criterion is None:
            return resident.dense if role == "fitness" else resident.dense_losses(role)
        try:
            resident.prune(criterion.metric, self.experiment.target(task, criterion.group))
            losses = resident.losses(role)
            return losses if math.isfinite(perplexity_of(losses)) else None
        except DegenerateScores:
            return None
        finally:
            resident.restore()

    def _resident(self, task: int) -> Resident:
        return self.residents[self.experiment.subject_of[task]]

    def _measure(self, candidate: Candidate) -> Outcome:
        if candidate.part:
            return self._sample(candidate.criterion, *candidate.part)
        criterion = candidate.criterion
        stages = [] if candidate.best is None else self.experiment.config.search.stages
        losses: list[list[float]] = [[] for _ in self.experiment.tasks]
        # All tasks to one rung, then all to the next: a second task tells more than a second rung
        # of the first, and costs a pruning, which takes less time than a window.
        for end, task in product((*stages, None), self.experiment.tasks_of("fitness")):
            resident = self._resident(task)
            if len(losses[task]) == len(resident.dense):
                continue
            if stages and (ended := self._ended(losses, candidate)):
                return ended
            resident.prune(criterion.metric, self.experiment.target(task, criterion.group))
            losses[task] += resident.losses("fitness", len(losses[task]), end)
            if not all(map(math.isfinite, losses[task])):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
        return self._outcome("evaluated", self.scale.fitness(losses), losses)

    def _sample(self, criterion: Criterion, part: int, parts: int) -> Outcome:
        """Measure one of so many parts of each task's windows, and at least as many as kinds."""
        losses: list[list[float]] = [[] for _ in self.experiment.tasks]
        for task in self.experiment.tasks_of("fitness"):
            resident = self._resident(task)
            resident.prune(criterion.metric, self.experiment.target(task, criterion.group))
            count = len(resident.dense)
            kinds = len(set(self.experiment.kinds_of(task, "fitness")))
            length = min(count, max(kinds, count // parts))
            start = part * length % (count - count % length)
            measured = resident.losses("fitness", start, start + length)
            losses[task] = [math.nan] * start + measured
            if not all(map(math.isfinite, measured)):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
        fitness = self.scale.fitness(losses)
        return self._outcome("sampled", None, losses, "to tune numbers", fitness)

    def _ended(self, losses: Sequence[Sequence[float]], candidate: Candidate) -> Outcome | None:
        """Return the predicted outcome of a candidate that is clearly not the best, or None.

        What was not measured yet may be as good as the best, so a prediction without something of
        each cell cannot stand for the fitness.
        """
        assert candidate.best is not None  # others have no rungs
        rise = self.scale.excess(losses, max(0.0, candidate.best), SLACK)
        if rise is None:
            return None
        if candidate.enter is not None and rise > candidate.enter:
            reason = f"relative rise {rise:.4f} above {candidate.enter:.4f}"
            return self._outcome("stopped", None, losses, reason, self.scale.fitness(losses))
        if None in self.scale.values(losses):
            return None
        return self._outcome("evaluated", rise, losses, "not to the end")

    def _outcome(
        self,
        kind: str,
        fitness: float | None,
        losses: Sequence[Sequence[float]],
        reason: str = "",
        estimate: float | None = None,
    ) -> Outcome:
        rises = self.scale.rises_by_task(losses)
        return Outcome(kind, fitness, self._tokens(losses), reason, estimate, rises)

    def _tokens(self, losses: Sequence[Sequence[float]]) -> int:
        """Return how many fitness tokens were measured."""
        lengths = [self._resident(task).tokens["fitness"].shape[1] for task in range(len(losses))]
        counts = [sum(not math.isnan(loss) for loss in part) for part in losses]
        return sum(count * length for count, length in zip(counts, lengths, strict=True))


def perplexity_of(losses: Sequence[float]) -> float:
    """Return the perplexity from per-window losses in nats per token."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))
