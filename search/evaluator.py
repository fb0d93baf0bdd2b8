"""From metric text to outcome: prune, measure, restore; over one task or several.

A `Resident` is a model that stays loaded for all candidates; here pruning and evaluation meet,
which do not know each other. An `Evaluator` measures each task stage by stage (`search.stages`), a
few windows first; a candidate that is clearly not the best is not measured to the end.
"""

import ctypes
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunevolve.evaluation.perplexity import perplexity, window_losses
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import linear_layers, load_model
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import collect, prune
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.pruning.store import ResidentStore
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.descent import Descent, Step, descend, shorten
from prunevolve.search.experiment import Experiment
from prunevolve.search.fingerprint import take_probe
from prunevolve.search.records import Candidate, Limits, Outcome
from prunevolve.search.scale import Scale
from prunevolve.search.slope import Ground

SLACK = 0.2
"""A candidate is clearly above the best after n windows if its predicted rise is so by this
fraction over the square root of n."""


class Resident:
    """One loaded model with a master copy of its dense weights and its token windows.

    Its tasks share a formula's scores. With low memory matrices of statistics are bfloat16, and
    scores are computed anew each time. A given model's weights are shared with other workers here.
    """

    def __init__(self, experiment: Experiment, number: int, given: PreTrainedModel | None) -> None:
        self.subject = subject = experiment.subjects[number]
        self.tokens, self._device = subject.tokens, experiment.device
        self._low_memory = experiment.config.low_memory
        self._tasks = experiment.subject_of.count(number)
        self.statistics: dict[str, Tensor] = {}
        model = given or load_model(subject.model, subject.dtype, self._device)
        self.store = ResidentStore(model.requires_grad_(False))
        # The loaded weights themselves: on the CPU the node's workers share them, in the object
        # store or through the mapped file, and pruning replaces the model's weights.
        self.master = {name: self.store.dense(name) for name in linear_layers(model)}
        self._pruned: tuple[Metric, Target] | None = None
        self._scored: Metric | None = None
        self._scores: dict[str, Tensor] = {}
        self._dense: dict[str, list[float]] = {}  # its losses by role: all its tasks have the same
        began = time.perf_counter()
        self.dense_losses("fitness")
        self.seconds = time.perf_counter() - began

    def collect_statistics(self, terminals: frozenset[str]) -> dict[str, Tensor]:
        """Collect statistics on the calibration text and return them by `X/layer`.

        Each block's statistics are moved to the host as soon as they are complete, with low memory
        as bfloat16, so that the device holds one block's fp32 sums at a time.
        """
        self.restore()

        def keep(key: str, tensor: Tensor) -> Tensor:
            is_matrix = TERMINALS[key.partition("/")[0]].shape == MATRIX
            # A vector would save little.
            return (tensor.bfloat16() if self._low_memory and is_matrix else tensor).cpu()

        return collect(self.store, self.tokens["calibration"], terminals, keep=keep)

    def use_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Prune by these statistics from now on; they are moved to the device once."""
        self.restore()
        self._scored, self._scores = None, {}
        self.statistics = {}  # the device may not have room for both
        give_back_freed_memory()  # left over if this process collected them itself
        self.statistics = {key: tensor.to(self._device) for key, tensor in tensors.items()}

    def losses(self, role: str, start: int = 0, end: int | None = None) -> list[float]:
        """Return the mean NLL of a text's windows `start` to `end`, in nats per token."""
        windows, store = self.tokens[role][start:end], self.store
        return window_losses(store.states(windows), store.logits, windows).tolist()

    def dense_losses(self, role: str) -> list[float]:
        """Return `losses` of the dense model; raise ValueError if one is not finite."""
        if role not in self._dense:
            losses = self.losses(role)
            if not all(map(math.isfinite, losses)):
                name, dtype = self.subject.model, self.subject.dtype
                rule = f"must have finite losses on its {role} text, got one that is not"
                raise ValueError(f"model {name!r} {rule}, in {dtype}: set dtype")
            self._dense[role] = losses
        return self._dense[role]

    def prune(self, metric: Metric, target: Target) -> None:
        """Prune the model, whatever its state was; DegenerateScores if there is no mask."""
        if self._pruned == (metric, target):
            return
        self.restore()
        if self._scored != metric:
            self._scored, self._scores = metric, {}
        needed_again = target.group.whole_model or self._tasks > 1
        with torch.no_grad():
            prune(
                self.store,
                Procedure(metric, target),
                {},  # all statistics are given
                statistics=self.statistics,
                kept_scores=self._scores if needed_again and not self._low_memory else None,
            )
        self._pruned = (metric, target)

    def ground(self, target: Target, weights: Sequence[float]) -> Ground:
        """Return where a descent prunes to a target, given weights of the windows it draws from;
        scores that are kept go, as it needs the room.
        """
        self._scored, self._scores = None, {}
        return Ground(
            self.store,
            self.master,
            self.statistics,
            target,
            self.tokens["descent"].to(self._device),
            torch.tensor(weights),
            self._low_memory,
        )

    def restore(self) -> None:
        """Restore the dense weights, bit for bit."""
        self._pruned = None
        self.store.restore(self.master)


class Evaluator:
    """Resident models, loaded unless they are given, that evaluate one candidate at a time."""

    def __init__(self, experiment: Experiment, models: Sequence[PreTrainedModel] = ()) -> None:
        torch.set_num_threads(experiment.config.ray.cpus_per_worker)
        keep_freed_memory()
        self.experiment = experiment
        of_subjects = enumerate(models or [None] * len(experiment.subjects))
        self.residents = [Resident(experiment, number, given) for number, given in of_subjects]
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
        """Return a candidate's outcome; see `evaluating`."""
        steps = self.evaluating(candidate)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome

    def evaluating(self, candidate: Candidate) -> Generator[Step, None, Outcome]:
        """Prune, measure on the fitness windows stage by stage, restore, and return the outcome.

        A descent comes first where the candidate is one, and yields after each step.
        """
        try:
            if candidate.origin != "descent":
                return self._measure(candidate)
            criterion, breeder = candidate.criterion, self.experiment.breeder
            added = (breeder.core, *breeder.factors)
            descent = self._descent(criterion, added, candidate.index)
            yield from descend(descent)
            tuned = simplify(replace(criterion, metric=descent.metric))
            if tuned.metric.problem:  # an exponent came to 0
                raise DegenerateScores(tuned.metric.problem)
            outcome = self._measure(replace(candidate, criterion=tuned))
            return replace(outcome, tuned=tuned)
        except DegenerateScores as error:
            # No mask can be made from the scores: the metric's fault, which only all layers show.
            return Outcome("degenerate", reason=str(error))
        finally:
            for resident in self.residents:
                resident.restore()

    def shortening(
        self, criterion: Criterion, index: int
    ) -> Generator[Step, None, list[tuple[Criterion, Metric]]]:
        """Return a candidate's criterion with ever fewer factors, and the base that each lost.

        Those that are left descend a little after each; yields after each step.
        """
        shorter = []
        try:
            for came in shorten(self._descent(criterion, (), index, 1)):
                if isinstance(came, Step):
                    yield came
                elif not came[0].problem:
                    shorter.append((simplify(replace(criterion, metric=came[0])), came[1]))
        except DegenerateScores:
            pass  # it is as short as it can be
        finally:
            for resident in self.residents:
                resident.restore()
        return shorter

    def _descent(self, criterion: Criterion, added: Sequence[Metric], *key: int) -> Descent:
        """Return a descent on all tasks, whose draws follow from a key."""
        experiment, grounds = self.experiment, []
        for task in experiment.tasks_of("fitness"):
            cells = {cell.text: cell for cell in self.scale.cells if cell.task == task}
            share = sum(cell.weight for cell in cells.values())
            kinds = experiment.kinds_of(task, "descent")
            target = experiment.target(task, criterion.group)
            weights = [share / cells[kind].rise for kind in kinds]
            grounds.append(self._resident(task).ground(target, weights))
        comparable, seed = experiment.breeder.comparable, experiment.config.search.seed
        return Descent(criterion.metric, added, comparable, grounds, (seed, *key))

    def losses(self, task: int, role: str, criterion: Criterion | None) -> list[float] | None:
        """Return each window's mean NLL on a task's text; the dense model's if criterion is None.

        None if the criterion cannot prune this model: it is degenerate, or the perplexity infinite.
        """
        resident = self._resident(task)
        if criterion is None:
            return resident.dense_losses(role)
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
        stages = self.experiment.config.search.stages if candidate.limits else []
        losses: list[list[float]] = [[] for _ in self.experiment.tasks]
        # All tasks to one stage, then all to the next: a second task tells more than a second stage
        # of the first, and costs a pruning, which takes less time than a window.
        for end, task in product((*stages, None), self.experiment.tasks_of("fitness")):
            resident = self._resident(task)
            if len(losses[task]) == len(resident.tokens["fitness"]):
                continue
            if stages and candidate.limits and (ended := self._ended(losses, candidate.limits)):
                return ended
            resident.prune(criterion.metric, self.experiment.target(task, criterion.group))
            measured = resident.losses("fitness", len(losses[task]), end)
            losses[task] += measured
            if not all(map(math.isfinite, measured)):
                return Outcome("degenerate", None, self._tokens(losses), "the loss is not finite")
        return Outcome("evaluated", self.scale.fitness(losses), self._tokens(losses))

    def _ended(self, losses: Sequence[Sequence[float]], limits: Limits) -> Outcome | None:
        """Return the predicted outcome of a candidate that is clearly not the best, or None.

        What was not measured yet may be as good as the best, so a prediction without something of
        each cell cannot stand for the fitness.
        """
        rise = self.scale.excess(losses, max(0.0, limits.best), SLACK)
        if rise is None:
            return None
        if rise > limits.entry:
            reason = f"relative rise {rise:.4f} above {limits.entry:.4f}"
            return Outcome("stopped", None, self._tokens(losses), reason)
        if None in self.scale.values(losses):
            return None
        return Outcome("evaluated", rise, self._tokens(losses), "not to the end")

    def _tokens(self, losses: Sequence[Sequence[float]]) -> int:
        """Return how many fitness tokens were measured."""
        return sum(
            self._resident(task).tokens["fitness"].shape[1] * len(part)
            for task, part in enumerate(losses)
        )


def perplexity_of(losses: Sequence[float]) -> float:
    """Return the perplexity from per-window losses in nats per token."""
    return perplexity(torch.tensor(losses, dtype=torch.float64))


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks; other C libraries are left alone.

    By default it returns every large block to the system, and each page of the next one costs a
    page fault: three quarters of the time of scoring a small model. With this the process holds its
    peak memory until it ends, and more: of 4.1 GiB of a 7B model's blocks, 1.9 were gaps.
    """
    _set_allocator(2**31 - 1, 0)


def free_memory_as_usual() -> None:
    """Undo `keep_freed_memory`: glibc gets its defaults, as it cannot be asked what it had."""
    _set_allocator(128 * 1024, 65536)
    give_back_freed_memory()


def _set_allocator(trim_threshold: int, mmap_max: int) -> None:
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_MMAP_MAX, mmap_max)
        mallopt(_TRIM_THRESHOLD, trim_threshold)


def give_back_freed_memory() -> None:
    """Return currently free memory to the system, after a step that will not come again."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
