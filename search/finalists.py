"""The finalists of a search, and which of them a person would choose.

A search gives a metric factors that help on its models and windows and nowhere else. So the best
finalist is also measured with one factor less, two less, and so on, the others descending a little
each time, and of all that is within one standard error of the best and at most 2% worse the
shortest wins (Breiman et al., 1984, Classification and Regression Trees, Section 3.4.3). A metric
is judged on the fitness and the selection texts alike, and the error is that between models as well
as that between windows.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rich.console import Console

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.search.breeding.factors import MAX_FACTORS
from prunevolve.search.breeding.product import can_descend, factors_of
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.pool import Pool
from prunevolve.search.records import Record
from prunevolve.search.scale import ByTask, Difference, losses_by_task, scale_of, yardsticks_of

CLOSE = 0.1  # of the best's fitness: what is worse by more on the fitness texts is out of the race
WORSE = 0.02  # of the best's fitness; from few models the error alone is too rough a limit
ROLES = ("fitness", "selection")  # the texts that finalists are measured on


@dataclass(frozen=True)
class Finalist:
    """A metric that may win: a candidate, or one without some of its factors."""

    name: str  # the candidate's index, and behind a dash how many factors were left out
    record: Record  # without these factors
    selection: float | None = None  # its fitness on the selection texts, if it can prune there
    losses: Sequence[ByTask] = ()  # on each of `ROLES`
    left_out: Metric | None = None  # the base of the last factor that was left out

    @property
    def fitness(self) -> float:
        """Mean of the fitness on both texts, by which finalists are ordered."""
        assert self.record.fitness is not None and self.selection is not None
        return (self.record.fitness + self.selection) / 2

    @property
    def factors(self) -> int:
        """Number of its factors."""
        return len(factors_of(self.record.criterion.metric))

    @property
    def described(self) -> JsonObject:
        """What JSON files say of it."""
        return {
            "name": self.name,
            **self.record.described,
            "factors": self.factors,
            "selection": self.selection,
            "left_out": self.left_out and self.left_out.text,
        }


@dataclass(frozen=True)
class Choice:
    """What came of the finalists."""

    winner: Finalist
    standings: Sequence[JsonObject] = ()  # all that were measured, the best first
    path: Sequence[JsonObject] = ()  # those of the winner's candidate, with ever fewer factors


def choose(
    experiment: Experiment,
    pool: Pool,
    candidates: Sequence[Record],  # the fittest, the best first
    before: Finalist | None,  # the winner of the same run before it was extended
    console: Console,
) -> Choice:
    """Measure finalists, the best of them also with fewer factors, and choose the winner.

    It has at most `MAX_FACTORS` factors, if any has, and is at least as good as the winner before.
    If none can prune a model of the selection, the fittest wins.
    """
    judge = _Judge(experiment, pool)
    best_rank, _ = candidates[0].rank
    near_best = [record for record in candidates if _is_near(record.rank[0], best_rank, CLOSE)]
    finalists = [Finalist(str(record.index), record) for record in near_best]
    was = before.record.criterion if before else None
    more = [before] if before and was not in [record.criterion for record in near_best] else []
    measured = judge.measured("finalists", [*finalists, *more], keep=was)
    if not measured:
        console.print("no finalist can prune all models of the selection: the fittest is taken")
        return Choice(finalists[0])
    measured.sort(key=lambda x: x.fitness)
    whole = [x for x in measured if "-" not in x.name and can_descend(x.record.criterion.metric)]
    leaders = whole[:1] if experiment.breeder.descends else []
    steps = judge.path(leaders[0].record) if leaders else []
    # The winner before may be a step again, or its candidate be shortened in another way now.
    names, again = {x.name for x in steps}, {x.record.criterion for x in steps}
    others = [x for x in measured if x.record.criterion not in again]
    others = [replace(x, name=f"{x.name}-before") if x.name in names else x for x in others]
    standings = sorted([*others, *steps], key=lambda x: x.fitness)
    short = [x for x in standings if x.factors <= MAX_FACTORS] or standings
    best = short[0]
    near = [x for x in short if _is_near(x.fitness, best.fitness, WORSE)]
    good = [x for x in near if judge.difference(x, best).is_small]
    if winner_before := [x for x in standings if x.record.criterion == was]:
        good = [x for x in good if x.fitness <= winner_before[0].fitness] or winner_before
    winner = min(good, key=lambda x: (x.factors, x.fitness))

    def row(finalist: Finalist) -> JsonObject:
        gap = judge.difference(finalist, best).as_json("difference")
        return finalist.described | gap | {"chosen": finalist is winner}

    path = [x for x in (*leaders, *steps) if x.record.index == winner.record.index]
    return Choice(winner, [row(x) for x in standings], [row(x) for x in path])


class _Judge:
    """Measures metrics on the fitness and the selection texts, and compares them."""

    def __init__(self, experiment: Experiment, pool: Pool) -> None:
        self._experiment, self._pool = experiment, pool
        self._best = math.inf  # fitness on the fitness texts, so far
        self._also = yardsticks_of(experiment, pool.scale, "selection")

    def measured(
        self, stage: str, finalists: Sequence[Finalist], keep: Criterion | None = None
    ) -> list[Finalist]:
        """Return those of some finalists that can prune all models, with what they have there.

        One that is clearly worse than the best on the fitness texts goes no further, unless it is
        to be kept.
        """
        able = []
        for x in self._able(stage, "fitness", finalists):
            outcome = replace(x.record.outcome, fitness=self._pool.scale.fitness(x.losses[0]))
            able.append(replace(x, record=Record(x.record.candidate, outcome)))
        self._best = min([self._best, *(x.record.rank[0] for x in able)])
        close = [
            x
            for x in able
            if x.record.criterion == keep or _is_near(x.record.rank[0], self._best, CLOSE)
        ]
        able = self._able(stage, "selection", close)
        scale = scale_of(self._experiment, "selection", self._pool.measured)
        self._scales = [self._pool.scale, scale]
        return [replace(x, selection=scale.fitness(x.losses[1])) for x in able]

    def _able(self, stage: str, role: str, finalists: Sequence[Finalist]) -> list[Finalist]:
        """Return those that can prune all models, with their losses on one more of the texts."""
        experiment = self._experiment
        tasks = experiment.tasks_of(role)
        wanted = [(task, role, x.record.criterion) for x in finalists for task in tasks]
        # Measured with them, so that all workers have something to do.
        measured = self._pool.losses(f"{stage} on the {role} texts", [*self._also, *wanted])
        return [
            replace(x, losses=[*x.losses, losses])
            for x in finalists
            if (losses := losses_by_task(experiment, role, x.record.criterion, measured))
        ]

    def path(self, leader: Record) -> list[Finalist]:
        """Return a leader with ever fewer factors, as far as these can prune and are close.

        What still has more than `MAX_FACTORS` factors cannot win, and is not measured.
        """
        steps = []
        path = self._pool.shorter("leaving out factors", leader)
        for number, (criterion, left_out) in enumerate(path, 1):
            shorter = Record(leader.candidate, replace(leader.outcome, tuned=criterion))
            steps.append(Finalist(f"{leader.index}-{number}", shorter, left_out=left_out))
        few = [step for step in steps if step.factors <= MAX_FACTORS]
        return self.measured("fewer factors", few)

    def difference(self, finalist: Finalist, other: Finalist) -> Difference:
        """Return how much worse a finalist is than another, and the error of that.

        The error is that between windows and that between models; if there is one model, between
        its cells.
        """
        mean, between_windows = 0.0, []
        parts: dict[object, list[tuple[float, float]]] = defaultdict(list)
        several = len({cell.model for scale in self._scales for cell in scale.cells}) > 1
        for role, scale, *losses in zip(
            ROLES, self._scales, finalist.losses, other.losses, strict=True
        ):
            gap = scale.difference(*losses)
            mean += gap.mean / len(ROLES)
            between_windows.append((gap.standard_error or 0.0) / len(ROLES))
            for cell, windows in scale.gaps(*losses):
                group = cell.model if several else (role, cell.task, cell.text)
                parts[group].append((cell.weight / len(ROLES), fmean(windows)))
        return Difference(mean, math.hypot(*between_windows, _error_between(list(parts.values()))))


def _is_near(fitness: float, best: float, share: float) -> bool:
    """Whether a fitness is worse than the best by at most a share of that."""
    return fitness - best <= share * abs(best)


def _error_between(parts: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return the standard error of a weighted mean over groups of weights and values."""
    weights = [sum(weight for weight, _ in group) for group in parts]
    means = [sum(w * x for w, x in group) / sum(w for w, _ in group) for group in parts]
    count = len(weights)
    if count < 2:
        return 0.0
    mean = sum(w * x for w, x in zip(weights, means, strict=True)) / sum(weights)
    squares = sum((w * (x - mean)) ** 2 for w, x in zip(weights, means, strict=True))
    return math.sqrt(squares * count / (count - 1))
