"""The scale of fitness: the loss increase relative to the best baseline's on the same windows.

A cell is one kind of text for one task. Its value is the candidate's rise in loss over the dense
model, divided by that of the best baseline there: below 1 is better than any known metric. So cells
of any model, sparsity and text can be averaged.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import NamedTuple, TypeAlias

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.search.experiment import Experiment
from prunevolve.search.records import Losses, Wanted

ByTask: TypeAlias = Sequence[Sequence[float]]  # losses of first windows, nats per token
Measured: TypeAlias = Mapping[Wanted, Losses]

_LEAST_RISE = 0.001  # nats per token: a smaller rise is rounding noise, and cannot serve as a unit
_LEAST_SHARE = 0.1  # of a window, so that one that hardly suffers, or gains, is no divisor
_PROFILED = 2  # the best baselines from which the shares of a cell's windows are estimated


@dataclass(frozen=True)
class Cell:
    """One kind of text for one task, with the losses of the dense model and the best baseline."""

    task: int
    model: str
    text: str
    weight: float  # in the mean over all cells; the weights add up to 1
    windows: tuple[int, ...]  # indices among the task's, ascending
    dense: Sequence[float]  # loss on each window, nats per token
    baseline: str
    rise: float  # of its mean loss over dense, nats per token, or that's error if larger
    shares: Sequence[float]  # typical rise of each window under pruning, as a multiple of the mean

    def rises(self, losses: Sequence[float]) -> list[float]:
        """Return the first windows' rises over dense, nats per token, given the task's losses."""
        windows = zip(self.windows, self.dense, strict=True)
        return [losses[window] - dense for window, dense in windows if window < len(losses)]

    def value(self, losses: Sequence[float]) -> float | None:
        """Return the relative rise estimated from the windows evaluated so far, or None."""
        rises = self.rises(losses)
        if not rises:
            return None
        share = 1.0 if len(rises) == len(self.dense) else fmean(self.shares[: len(rises)])
        return fmean(rises) / share / self.rise


class Difference(NamedTuple):
    """How much worse the first of two metrics is, over the same windows."""

    mean: float
    standard_error: float | None  # of the mean; None if a cell has a single window

    @property
    def is_small(self) -> bool:
        """Whether it is within its error."""
        return self.mean <= (self.standard_error or 0.0)

    def as_json(self, name: str) -> JsonObject:
        """Return it for a file, the mean under a name."""
        return {name: self.mean, "standard_error": self.standard_error}


@dataclass(frozen=True)
class Scale:
    """All cells, in the order of the tasks; the weighted mean of their values is the fitness."""

    cells: Sequence[Cell]
    baselines: Mapping[str, float]  # fitness of each that can prune all tasks

    def values(self, losses: ByTask) -> list[float | None]:
        """Return each cell's relative rise, or None where no window was evaluated."""
        return [cell.value(losses[cell.task]) for cell in self.cells]

    def fitness(self, losses: ByTask, missing: float = math.nan) -> float:
        """Return the fitness; a cell in which no window was evaluated has the value `missing`."""
        values = (missing if value is None else value for value in self.values(losses))
        return sum(cell.weight * value for cell, value in zip(self.cells, values, strict=True))

    def excess(self, losses: ByTask, limit: float, slack: float) -> float | None:
        """Return the predicted relative rise if it is clearly above a limit of 0 or more.

        Cells not evaluated yet are assumed to equal the limit; slack is the tolerance for the value
        of a single window, as a fraction.
        """
        seen = [max(1, len(cell.rises(losses[cell.task]))) for cell in self.cells]
        error = math.sqrt(sum(c.weight**2 / n for c, n in zip(self.cells, seen, strict=True)))
        rise = self.fitness(losses, limit)
        return rise if rise > limit * (1 + slack * error) else None

    def difference(self, losses: ByTask, reference: ByTask) -> Difference:
        """Return how much worse a fitness is than the reference's, with its standard error.

        Tasks on the same windows of a model vary together, so their gaps are added up by window
        first; other models and texts are independent.
        """
        shared: dict[tuple[str, str, tuple[int, ...]], list[list[float]]] = defaultdict(list)
        for cell, gaps in self.gaps(losses, reference):
            weighted = [cell.weight * gap for gap in gaps]
            shared[cell.model, cell.text, cell.windows].append(weighted)
        sums = [[sum(window) for window in zip(*gaps, strict=True)] for gaps in shared.values()]
        errors = [_standard_error(windows) for windows in sums]
        error = None if None in errors else math.hypot(*filter(None, errors))
        return Difference(sum(map(fmean, sums)), error)

    def gaps(self, losses: ByTask, reference: ByTask) -> Iterator[tuple[Cell, list[float]]]:
        """Yield by how much more each cell's relative rise is than the reference's, by window."""
        for cell in self.cells:
            rises = (cell.rises(by_task[cell.task]) for by_task in (losses, reference))
            yield cell, [(a - b) / cell.rise for a, b in zip(*rises, strict=True)]


# How the dense model and the baselines are measured, on any of the texts


def wanted_of(experiment: Experiment, role: str, tasks: Sequence[int] = ()) -> list[Wanted]:
    """Return what a scale is made of: the dense model and the baselines on a text of some tasks, by
    default all that count.
    """
    criteria = [None, *experiment.baselines.values()]
    return [(x, role, y) for x in tasks or experiment.tasks_of(role) for y in criteria]


def yardsticks_of(experiment: Experiment, scale: Scale, role: str) -> list[Wanted]:
    """Return what a scale on another text is made of: the dense model and the baselines that are
    best on the first, or on models that it has no cells of all.
    """
    wanted: list[Wanted] = []
    for task in experiment.tasks_of(role):
        best = {cell.baseline for cell in scale.cells if cell.task == task} or experiment.baselines
        criteria = [None, *(experiment.baselines[name] for name in sorted(best))]
        wanted += [(task, role, criterion) for criterion in criteria]
    return wanted


def losses_by_task(
    experiment: Experiment, role: str, criterion: Criterion, measured: Measured
) -> ByTask | None:
    """Return a metric's losses on a text of all tasks; None if one that counts has none."""
    losses = [measured.get((task, role, criterion)) or [] for task in range(len(experiment.tasks))]
    return losses if all(losses[task] for task in experiment.tasks_of(role)) else None


def baselines_on(
    experiment: Experiment, task: int, role: str, measured: Measured
) -> dict[str, list[float]]:
    """Return the losses on a task's text under each baseline that was measured and can prune it."""
    by_name = {name: measured.get((task, role, x)) for name, x in experiment.baselines.items()}
    return {name: losses for name, losses in by_name.items() if losses}


def scale_of(experiment: Experiment, role: str, measured: Measured) -> Scale:
    """Return the scale of one of the texts, given `wanted_of` it or `yardsticks_of` it."""
    tasks = experiment.tasks_of(role)
    cells = [cell for task in tasks for cell in cells_of(experiment, task, role, measured)]
    scale = Scale(cells, {})
    fitness = {
        name: scale.fitness(losses)
        for name, criterion in experiment.baselines.items()
        if (losses := losses_by_task(experiment, role, criterion, measured))
    }
    return Scale(cells, fitness)


def cells_of(experiment: Experiment, task: int, role: str, measured: Measured) -> list[Cell]:
    """Return a task's cells on one of its texts, weighted by their numbers of windows."""
    # Tasks of weight 0 are only compared with one another.
    weights = [experiment.tasks[other].weight or 1 for other in experiment.tasks_of(role)]
    share = (experiment.tasks[task].weight or 1) / sum(weights)
    kinds = experiment.kinds_of(task, role)
    dense, baselines = measured[task, role, None], baselines_on(experiment, task, role, measured)
    assert dense is not None
    if not baselines:
        raise ValueError(f"no baseline can prune task {task}: there is nothing to compare with")
    cells = []
    for kind in dict.fromkeys(kinds):
        windows = [i for i, other in enumerate(kinds) if other == kind]
        gaps = {name: [x[i] - dense[i] for i in windows] for name, x in baselines.items()}
        baseline, rise, shares = unit_of(gaps)
        cells.append(
            Cell(
                task=task,
                model=experiment.tasks[task].model,
                text=kind,
                weight=share * len(windows) / len(kinds),
                windows=tuple(windows),
                dense=[dense[i] for i in windows],
                baseline=baseline,
                rise=rise,
                shares=shares,
            )
        )
    return cells


def unit_of(rises: Mapping[str, Sequence[float]]) -> tuple[str, float, list[float]]:
    """Return the best baseline, its rise and the shares of the windows, as a cell has them, given
    each baseline's rises by window, nats per token.
    """
    ranked = sorted(rises, key=lambda name: fmean(rises[name]))
    profiles = [rises[name] for name in ranked if fmean(rises[name]) >= _LEAST_RISE][:_PROFILED]
    best = rises[ranked[0]]
    shares = [[rise / fmean(part) for rise in part] for part in profiles] or [[1.0] * len(best)]
    # On few short windows the rise can be smaller than its error, and is then no unit either.
    unit = max(_LEAST_RISE, _standard_error(best) or 0.0, fmean(best))
    return ranked[0], unit, [max(_LEAST_SHARE, fmean(x)) for x in zip(*shares, strict=True)]


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two lists of losses window by window: far less noisy than the losses themselves."""
    gaps = [a - b for a, b in zip(losses, reference, strict=True)]
    return Difference(fmean(gaps), _standard_error(gaps))


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for a single value."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None
