"""From metric text to outcome: prune, measure, restore; over one task or several.

Each task is measured stage by stage (`search.stages`), a few windows first; a candidate that is
clearly not the best is not measured to the end.
"""

import math
from collections.abc import Sequence
from itertools import product, zip_longest

import torch
from torch import Tensor

from prunevolve.evaluation.perplexity import perplexity
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.experiment import Experiment
from prunevolve.search.fingerprint import take_probe
from prunevolve.search.records import Candidate, Kind, Outcome
from prunevolve.search.resident import Resident, Weights, keep_freed_memory
from prunevolve.search.scale import Scale

SLACK = 0.2
"""A candidate is clearly above the best after n windows if its predicted rise is so by this
fraction over the square root of n."""


class Evaluator:
    """Resident models, loaded unless weights are given, that evaluate one candidate at a time."""

    def __init__(self, experiment: Experiment, weights: Sequence[Weights | None] = ()) -> None:
        torch.set_num_threads(experiment.config.ray.cpus_per_worker)
        keep_freed_memory()
        self.experiment = experiment
        tasks, low_memory = experiment.subject_of.count, experiment.config.low_memory
        self.residents = [
            Resident(subject, experiment.device, low_memory, tasks(number), given)
            for number, (subject, given) in enumerate(zip_longest(experiment.subjects, weights))
        ]
        self.scale: Scale  # set before the first candidate

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Collect a model's statistics and return them by `X/layer`; they are not used yet."""
        return self.residents[subject].collect_statistics(self.experiment.terminals)

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""
        tasks = [i for i, other in enumerate(self.experiment.subject_of) if other == subject]
        targets = [self.experiment.target(task, "row") for task in tasks]
        resident = self.residents[subject]
        return take_probe(resident.master, resident.statistics, resident.store.blocks, targets)

    def evaluate(self, candidate: Candidate) -> Outcome:
        """Prune, measure on the fitness windows stage by stage, and restore."""
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
        criterion = candidate.criterion
        stages = [] if candidate.best is None else self.experiment.config.search.stages
        losses: list[list[float]] = [[] for _ in self.experiment.tasks]
        # All tasks to one stage, then all to the next: a second task tells more than a second stage
        # of the first, and costs a pruning, which takes less time than a window.
        for end, task in product((*stages, None), self.experiment.tasks_of("fitness")):
            resident = self._resident(task)
            if candidate.part:
                start, end = self._sample(task, *candidate.part)
                losses[task] = [math.nan] * start
            elif len(losses[task]) == len(resident.dense):
                continue
            elif stages and (ended := self._ended(losses, candidate)):
                return ended
            resident.prune(criterion.metric, self.experiment.target(task, criterion.group))
            measured = resident.losses("fitness", len(losses[task]), end)
            losses[task] += measured
            if not all(map(math.isfinite, measured)):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
        fitness = self.scale.fitness(losses)
        if candidate.part:
            return self._outcome("sampled", None, losses, "to tune numbers", fitness)
        return self._outcome("evaluated", fitness, losses)

    def _sample(self, task: int, part: int, parts: int) -> tuple[int, int]:
        """Return start and end of a part of the task's windows: at least as many as text kinds."""
        count = len(self._resident(task).dense)
        kinds = len(set(self.experiment.kinds_of(task, "fitness")))
        length = min(count, max(kinds, count // parts))
        start = part * length % (count - count % length)
        return start, start + length

    def _ended(self, losses: Sequence[Sequence[float]], candidate: Candidate) -> Outcome | None:
        """Return the predicted outcome of a candidate that is clearly not the best, or None.

        What was not measured yet may be as good as the best, so a prediction without something of
        each cell cannot stand for the fitness.
        """
        assert candidate.best is not None  # others have no stages
        rise = self.scale.excess(losses, max(0.0, candidate.best), SLACK)
        if rise is None:
            return None
        if candidate.limit is not None and rise > candidate.limit:
            reason = f"relative rise {rise:.4f} above {candidate.limit:.4f}"
            return self._outcome("stopped", None, losses, reason, self.scale.fitness(losses))
        if None in self.scale.values(losses):
            return None
        return self._outcome("evaluated", rise, losses, "not to the end")

    def _outcome(
        self,
        kind: Kind,
        fitness: float | None,
        losses: Sequence[Sequence[float]],
        reason: str = "",
        estimate: float | None = None,
    ) -> Outcome:
        rises = self.scale.rises_by_task(losses)
        return Outcome(kind, fitness, self._tokens(losses), reason, estimate, rises)

    def _tokens(self, losses: Sequence[Sequence[float]]) -> int:
        """Return how many fitness tokens were measured."""
        return sum(
            self._resident(task).tokens["fitness"].shape[1] * sum(not math.isnan(x) for x in part)
            for task, part in enumerate(losses)
        )


def perplexity_of(losses: Sequence[float]) -> float:
    """Return the perplexity from per-window losses in nats per token."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))
