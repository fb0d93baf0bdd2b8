"""From metric text to outcome: prune, measure, restore; over one task or several.

An `Evaluator` holds its models with everything that a candidate needs, loaded once. Each task is
measured stage by stage, a few windows first; a candidate that cannot enter the population is
stopped.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from prunevolve.evaluation.perplexity import perplexity
from prunevolve.pruning.masks import GROUPS, DegenerateScores, NOfM, Target, group_of
from prunevolve.pruning.metric import Criterion
from prunevolve.search.memory import keep_freed_memory
from prunevolve.search.population import Candidate, Outcome
from prunevolve.search.resident import Resident, Subject, Weights
from prunevolve.search.scale import Scale

SLACK = 0.2
"""A candidate is clearly above the best after n windows if its predicted rise is so by this
fraction over the square root of n."""


@dataclass(frozen=True)
class Task:
    """A pruning task that candidates are measured on.

    Attributes:
        name: A few words.
        subject: Index of the model.
        sparsity: Fraction of the weights to remove.
        pattern: An n:m group, or None for unstructured sparsity.
        weight: Weight of this task relative to the others; 0 if it only chooses the winner.
    """

    name: str
    subject: int
    sparsity: float
    pattern: NOfM | None
    weight: float

    def target(self, group: str) -> Target:
        """Return the target for a comparison group; a pattern fixes its own group."""
        return Target(self.sparsity, self.pattern or group_of(group))


@dataclass(frozen=True)
class Setup:
    """What an evaluator is built from: plain values only, so that any machine can build one.

    Attributes:
        subjects: The models.
        windows: Each model's token ids by role (calibration, fitness, selection, report), each
            (N, T).
        tasks: One or more; those of weight 0 come last.
        leaves: Statistics that metrics may use.
        device: A torch device.
        threads: torch threads.
        stages: Fitness windows after which a candidate may be stopped, ascending.
        low_memory: Whether matrices of statistics are bfloat16, and scores are not kept.
        kinds: Each window's kind of text, by role, for each model; empty if there is only one.
    """

    subjects: tuple[Subject, ...]
    windows: tuple[Mapping[str, Tensor], ...]
    tasks: tuple[Task, ...]
    leaves: frozenset[str]
    device: str
    threads: int
    stages: tuple[int, ...]
    low_memory: bool = False
    kinds: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def tasks_of(self, role: str) -> list[int]:
        """Return the tasks that are measured on a text when metrics are compared.

        On the selection text those of weight 0, if there are any; else those that have a weight.
        """
        chosen = [i for i, task in enumerate(self.tasks) if role == "selection" and not task.weight]
        return chosen or [i for i, task in enumerate(self.tasks) if task.weight]

    def kinds_of(self, task: int, role: str) -> tuple[str, ...]:
        """Return the kind of text of each window of a task."""
        subject = self.tasks[task].subject
        if self.kinds:
            return self.kinds[subject][role]
        return ("text",) * len(self.windows[subject][role])


class Evaluator:
    """Resident models that evaluate candidates, one after the other.

    Its `scale` defines the fitness.

    Args:
        setup: What it is built from.
        weights: Each model's weights, if they are already here; the others are loaded.
    """

    def __init__(self, setup: Setup, weights: Sequence[Weights | None] = ()) -> None:
        torch.set_num_threads(setup.threads)
        keep_freed_memory()
        self.setup = setup
        tasks = Counter(task.subject for task in setup.tasks)
        self.residents = [
            Resident(subject, windows, setup.device, setup.low_memory, given, tasks[i])
            for i, (subject, windows, given) in enumerate(
                zip_longest(setup.subjects, setup.windows, weights)
            )
        ]
        self.scale: Scale  # `use_scale` sets it, before the first candidate

    @property
    def seconds(self) -> float:
        """Time that measuring all fitness windows took on the dense models."""
        return sum(resident.seconds for resident in self.residents)

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of those dense weights of the models that get pruned."""
        return tuple(resident.digest() for resident in self.residents)

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Collect a model's statistics and return them by `X/layer`; see `use_statistics`."""
        resident, leaves = self.residents[subject], self.setup.leaves
        return resident.collect_statistics(leaves, "calibration")

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Use a model's statistics; see `Resident.use_statistics`."""
        self.residents[subject].use_statistics(tensors)

    def use_scale(self, scale: Scale) -> None:
        """Measure candidates on this scale from now on."""
        self.scale = scale

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""
        tasks = (task for task in self.setup.tasks if task.subject == subject)
        return self.residents[subject].probe_tensors(task.target(GROUPS[0]) for task in tasks)

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

        None if the criterion is degenerate on this model.
        """
        resident = self.residents[self.setup.tasks[task].subject]
        if criterion is None:
            return resident.dense.tolist() if role == "fitness" else resident.losses(role)
        try:
            with resident.pruned(criterion.metric, self.setup.tasks[task].target(criterion.group)):
                return resident.losses(role)
        except DegenerateScores:
            return None

    def _measure(self, candidate: Candidate) -> Outcome:
        criterion = candidate.criterion
        losses: list[list[float]] = [[] for _ in self.setup.tasks]
        for i, end in self._visits():
            task = self.setup.tasks[i]
            resident = self.residents[task.subject]
            if len(losses[i]) == len(resident.dense):
                continue
            if self.setup.stages and (ended := self._ended(losses, candidate)):
                return ended
            resident.prune(criterion.metric, task.target(criterion.group))
            losses[i] += resident.measure(len(losses[i]), end).tolist()
            if not all(map(math.isfinite, losses[i])):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
        return self._outcome("evaluated", self.scale.fitness(losses), losses)

    def _ended(self, losses: Sequence[Sequence[float]], candidate: Candidate) -> Outcome | None:
        """Return the predicted outcome of a candidate that is clearly not the best, or None.

        What was not measured yet may be as good as the best. Only when something of each cell was,
        the prediction can stand for the fitness.
        """
        if candidate.best is None:
            return None
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

    def _visits(self) -> Iterator[tuple[int, int | None]]:
        """Yield tasks with the end of the window range to measure next.

        All tasks to one stage, then all to the next: a second task tells more than a second stage
        of the first, and costs a pruning, which takes less time than a window.
        """
        tasks = self.setup.tasks_of("fitness")
        yield from ((task, end) for end in (*self.setup.stages, None) for task in tasks)

    def _tokens(self, losses: Sequence[Sequence[float]]) -> int:
        subjects = [task.subject for task in self.setup.tasks]
        lengths = [self.setup.windows[subject]["fitness"].shape[1] for subject in subjects]
        return sum(len(part) * length for part, length in zip(losses, lengths, strict=True))


def perplexity_of(losses: Sequence[float]) -> float:
    """Return the perplexity from per-window losses in nats per token."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))
