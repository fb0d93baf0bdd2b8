"""Metric text to outcome: prune, measure, restore; over one task or several.

An `Evaluator` holds its models with all that a candidate needs, loaded once. Each stage looks at
a few more windows of every task, and a candidate that cannot enter the population goes no further.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from evaluation.perplexity import perplexity
from pruning.baselines import BASELINES
from pruning.criterion import Criterion
from pruning.masks import DegenerateScores, NOfM, Target, group_of
from pruning.memory import keep_freed_memory
from search.population import Candidate, Outcome
from search.resident import Memory, Resident, Subject, Weights

REFERENCES = ("snip", "wanda")
"""Baselines that tell how the windows of a fitness text differ under any pruning."""


ZerosAndOverlap = dict[str, tuple[float, float]]
"""By layer, a fraction of zeros and a mask overlap."""


@dataclass(frozen=True)
class Task:
    """What a candidate is asked to do.

    Attributes:
        name: In a few words.
        subject: Index of the model.
        sparsity: Fraction of the weights to remove.
        pattern: An n:m group, or None for unstructured sparsity.
        weight: Of this task's rise of NLL over dense in the fitness.
    """

    name: str
    subject: int
    sparsity: float
    pattern: NOfM | None
    weight: float

    def target(self, group: str) -> Target:
        """Return what to remove under a comparison group; a pattern has its own."""
        return Target(self.sparsity, self.pattern or group_of(group))


@dataclass(frozen=True)
class Setup:
    """What an evaluator is built from: plain values alone, so that any machine can build it.

    Attributes:
        subjects: The models.
        windows: Token ids by role (calibration, fitness, selection, report), each (N, T), for
            each model.
        tasks: One or more.
        leaves: Statistics that metrics may name.
        objective: `nll` or `kl`.
        device: A torch device.
        threads: torch threads.
        stages: Fitness windows after which a candidate may be stopped, ascending.
        slack: A stop after one window needs this much more rise than the threshold's, as a
            fraction; after n windows, 1 / sqrt(n) of it.
        hopeless: Rise over dense, nats per token, that always stops.
        memory: What is held beside the models, and where.
    """

    subjects: tuple[Subject, ...]
    windows: tuple[Mapping[str, Tensor], ...]
    tasks: tuple[Task, ...]
    leaves: frozenset[str]
    objective: str
    device: str
    threads: int
    stages: tuple[int, ...]
    slack: float
    hopeless: float
    memory: Memory = field(default_factory=Memory)


class Evaluator:
    """Resident models that evaluate candidates, one candidate after the other.

    The fitness of one task is the mean of the objective over its fitness windows. Of several it
    is the mean of the tasks' rises over dense by weight, since losses on unlike texts and models
    have no common scale.

    Args:
        setup: What it is built from.
        weights: Of each model, those that are here; the others are loaded.
    """

    def __init__(self, setup: Setup, weights: Sequence[Weights | None] = ()) -> None:
        torch.set_num_threads(setup.threads)
        keep_freed_memory()
        self.setup = setup
        self.residents = [
            Resident(subject, windows, setup.device, setup.objective, setup.memory, given)
            for subject, windows, given in zip_longest(setup.subjects, setup.windows, weights)
        ]
        self._profiles: dict[int, Tensor] = {}

    @property
    def seconds(self) -> float:
        """How long all fitness windows took on the dense models."""
        return sum(resident.seconds for resident in self.residents)

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of the models' dense weights that are pruned."""
        return tuple(resident.digest() for resident in self.residents)

    def ping(self) -> None:
        """Return at once: a worker that does is there."""

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Collect a model's statistics and return them by `X/layer`; see `use_statistics`."""
        return self.residents[subject].collect_statistics(self.setup.leaves)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Use a model's statistics, and see what its windows suffer under `REFERENCES`."""
        self.residents[subject].use_statistics(tensors)
        if self.setup.stages:
            for index, task in enumerate(self.setup.tasks):
                if task.subject == subject:
                    self._profiles[index] = self._profile(task)

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""
        return self.residents[subject].probe_tensors()

    def evaluate(self, candidate: Candidate) -> Outcome:
        """Prune, measure on the fitness windows stage by stage, restore."""
        try:
            return self._measure(candidate)
        except DegenerateScores as error:
            # Scores that no mask can be made of: the metric's fault, found only on all layers.
            return Outcome("degenerate", reason=str(error))
        finally:
            for resident in self.residents:
                resident.restore()

    def losses(self, task: int, role: str, criterion: Criterion | None) -> list[float] | None:
        """Return each window's mean NLL on a task's text, dense if the criterion is None.

        None if the criterion is degenerate on this model.
        """
        resident = self.residents[self.setup.tasks[task].subject]
        if criterion is None:
            return resident.losses(role)
        try:
            with resident.pruned(criterion.metric, self.setup.tasks[task].target(criterion.group)):
                return resident.losses(role)
        except DegenerateScores:
            return None

    def zeros_and_overlap(self, task: int, one: Criterion, other: Criterion) -> ZerosAndOverlap:
        """Compare the masks of two criteria, layer by layer.

        Returns:
            By layer: the fraction of zeros under `other`, and the weights that both remove over
            those that either does. Empty if one of them is degenerate on this model.
        """
        asked = self.setup.tasks[task]
        resident = self.residents[asked.subject]
        masks = [
            resident.masks(criterion.metric, asked.target(criterion.group))
            for criterion in (one, other)
        ]
        found = {}
        try:
            for (name, a), (_, b) in zip(*masks, strict=True):
                either = int((a | b).sum())
                overlap = int((a & b).sum()) / either if either else 1.0
                found[name] = (int(b.sum()) / b.numel(), overlap)
        except DegenerateScores:
            return {}
        return found

    def _measure(self, candidate: Candidate) -> Outcome:
        criterion = candidate.criterion
        losses = [torch.empty(0, dtype=torch.float64) for _ in self.setup.tasks]
        for end in (*self.setup.stages, None):
            for i, task in enumerate(self.setup.tasks):
                resident = self.residents[task.subject]
                resident.prune(criterion.metric, task.target(criterion.group))
                losses[i] = torch.cat([losses[i], resident.measure(len(losses[i]), end)])
            if not all(torch.isfinite(part).all() for part in losses):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
            if end and (reason := self._stop_reason(losses, candidate.stop_above)):
                return Outcome("stopped", None, self._tokens(losses), reason)
        return Outcome("evaluated", self._fitness(losses), self._tokens(losses))

    def _tokens(self, losses: list[Tensor]) -> int:
        subjects = [task.subject for task in self.setup.tasks]
        lengths = [self.setup.windows[subject]["fitness"].shape[1] for subject in subjects]
        return sum(len(part) * length for part, length in zip(losses, lengths, strict=True))

    def _fitness(self, losses: list[Tensor]) -> float:
        return losses[0].mean().item() if len(losses) == 1 else self._rise(losses)

    def _rise(self, losses: list[Tensor]) -> float:
        """Return the mean rise over dense that the windows so far let expect, by weight."""
        total = 0.0
        for i, (task, part) in enumerate(zip(self.setup.tasks, losses, strict=True)):
            dense = self.residents[task.subject].dense
            rise = (part - dense[: len(part)]).mean().item()
            if len(part) < len(dense):
                rise /= self._profiles[i][: len(part)].mean().item()
            total += task.weight * rise
        return total / sum(task.weight for task in self.setup.tasks)

    def _profile(self, task: Task) -> Tensor:
        """Return a task's windows' rises over their mean, as they are under `REFERENCES`.

        Some windows suffer more from any pruning than others; without that, the first windows
        would judge all candidates too hard, or too softly.
        """
        resident = self.residents[task.subject]
        shares = []
        for name in REFERENCES:
            criterion = BASELINES[name].criterion
            with resident.pruned(criterion.metric, task.target(criterion.group)):
                rises = resident.measure(0, None) - resident.dense
            if torch.isfinite(rises).all() and rises.mean() > 0:
                shares.append(rises / rises.mean())
        even = torch.ones(len(resident.dense), dtype=torch.float64)
        mean = torch.stack(shares or [even]).mean(0)
        # A window that hardly suffers, or gains, says little: no division by next to nothing.
        return mean.clamp(min=0.1)

    def _stop_reason(self, losses: list[Tensor], stop_above: float | None) -> str:
        """Compare rises over the dense model: they vary far less by window than losses do."""
        rise, limit = self._rise(losses), self.setup.hopeless
        if stop_above is not None:
            if len(losses) == 1:
                stop_above -= self.residents[self.setup.tasks[0].subject].dense.mean().item()
            slack = self.setup.slack / math.sqrt(min(len(part) for part in losses))
            limit = min(limit, max(0.0, stop_above) * (1 + slack))
        return f"rise {rise:.4f} above {limit:.4f}" if rise > limit else ""


def perplexity_of(losses: list[float]) -> float:
    """Return the perplexity that per-window losses in nats per token make."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))
