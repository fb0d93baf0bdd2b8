"""The scale of fitness: the loss increase relative to the best baseline's on the same windows.

A cell is one kind of text for one task. Its value is the candidate's rise in loss over the dense
model, divided by that of the best baseline there: below 1 is better than any known metric. So cells
of any model, sparsity and text can be averaged.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, variance
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.parse import named_metric
from prunevolve.search.experiment import Experiment
from prunevolve.search.records import Losses, Wanted

Measure = Callable[[Sequence[Wanted]], Sequence[Losses]]
"""`Pool.losses`."""

KNOWN = 1 + len(BASELINES)
"""What a scale needs to be measured on each task: the dense model and the baselines."""

_LEAST_RISE = 0.001
"""Nats per token. A smaller rise is rounding noise, and cannot serve as a unit."""

_LEAST_SHARE = 0.1
"""Lower limit of a window's share, so that one that hardly suffers, or gains, is no divisor."""

_PROFILED = 2
"""Number of the best baselines from which the shares of a cell's windows are estimated."""

_Losses = Annotated[tuple[float, ...], Field(min_length=1)]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Values):
    """One kind of text for one task, with the losses of the dense model and the baselines.

    Attributes:
        task: Index of the task.
        model: The task's model; unknown in the file of an older version.
        text: The kind of text.
        weight: Weight in the mean over all cells; the weights add up to 1.
        windows: Indices of its windows among the task's.
        dense: The dense model's loss on each window, nats per token.
        baseline: The best baseline.
        rise: Rise of that metric's mean loss over dense, nats per token, or its standard error if
            that is larger.
        shares: Typical rise of each window under pruning, as a multiple of the mean.
    """

    task: int = Field(ge=0)
    model: str = ""
    text: str
    weight: float = Field(gt=0)
    windows: tuple[int, ...] = Field(min_length=1)
    dense: _Losses
    baseline: str
    rise: float = Field(ge=_LEAST_RISE)
    shares: _Losses

    def rises(self, losses: Sequence[float]) -> list[float]:
        """Return the rises over dense, nats per token, given losses on the task's first windows.

        A loss that was not measured is NaN, and has no rise.
        """
        return [losses[self.windows[i]] - self.dense[i] for i in self._measured(losses)]

    def _measured(self, losses: Sequence[float]) -> list[int]:
        return [
            place
            for place, window in enumerate(self.windows)
            if window < len(losses) and not math.isnan(losses[window])
        ]

    def value(self, losses: Sequence[float]) -> float | None:
        """Return the relative rise estimated from the windows evaluated so far, or None."""
        rises = self.rises(losses)
        if not rises:
            return None
        whole = len(rises) == len(self.dense)
        share = 1.0 if whole else fmean(self.shares[i] for i in self._measured(losses))
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


class Scale(_Values):
    """All cells, in the order of the tasks; the weighted mean of their values is the fitness.

    Losses are given for each task, on its first windows.

    Attributes:
        baselines: Fitness of each baseline that can prune all tasks.
    """

    cells: tuple[Cell, ...] = Field(min_length=1)
    baselines: dict[str, float] = {}

    def values(self, losses: Sequence[Sequence[float]]) -> list[float | None]:
        """Return each cell's relative rise, or None where no window was evaluated."""
        return [cell.value(losses[cell.task]) for cell in self.cells]

    def rises_by_task(self, losses: Sequence[Sequence[float]]) -> tuple[float | None, ...]:
        """Return each task's relative rise, of its kinds of text evaluated so far; None if none."""
        rises: list[float | None] = []
        for task in sorted({cell.task for cell in self.cells}):
            seen = [(c.weight, c.value(losses[task])) for c in self.cells if c.task == task]
            known = [(weight, value) for weight, value in seen if value is not None]
            total = sum(weight for weight, _ in known)
            rises.append(sum(weight * value for weight, value in known) / total if known else None)
        return tuple(rises)

    def fitness(self, losses: Sequence[Sequence[float]]) -> float:
        """Return the fitness, estimated if windows are missing.

        Cells not evaluated yet are assumed to equal the mean of the others.
        """
        values = self.values(losses)
        return self._mean(values, fmean(value for value in values if value is not None))

    def excess(self, losses: Sequence[Sequence[float]], limit: float, slack: float) -> float | None:
        """Return the predicted relative rise if it is clearly above a limit.

        Cells not evaluated yet are assumed to equal the limit.

        Args:
            limit: The relative rise to beat, 0 or more.
            slack: Tolerance for the value of a single window, as a fraction.
        """
        seen = [max(1, len(cell.rises(losses[cell.task]))) for cell in self.cells]
        error = math.sqrt(sum(c.weight**2 / n for c, n in zip(self.cells, seen, strict=True)))
        rise = self._mean(self.values(losses), limit)
        return rise if rise > limit * (1 + slack * error) else None

    def difference(
        self, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> Difference:
        """Return how much worse a fitness is than the reference's, with its standard error.

        Tasks on the same windows of a model vary together, so their gaps are added up by window
        first; other models and texts are independent.
        """
        shared: dict[tuple[str, str, tuple[int, ...]], list[list[float]]] = defaultdict(list)
        for cell, gaps in self._gaps(losses, reference):
            weighted = [cell.weight * gap for gap in gaps]
            shared[cell.model, cell.text, cell.windows].append(weighted)
        sums = [[sum(window) for window in zip(*gaps, strict=True)] for gaps in shared.values()]
        errors = [_standard_error(windows) for windows in sums]
        known = [error for error in errors if error is not None]
        error = math.hypot(*known) if len(known) == len(errors) else None
        return Difference(sum(map(fmean, sums)), error)

    def gaps(
        self, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> list[tuple[Cell, float]]:
        """Return by how much more each cell's relative rise is than the reference's."""
        return [(cell, fmean(gaps)) for cell, gaps in self._gaps(losses, reference)]

    def _gaps(
        self, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> Iterator[tuple[Cell, list[float]]]:
        for cell in self.cells:
            rises = (cell.rises(by_task[cell.task]) for by_task in (losses, reference))
            yield cell, [(a - b) / cell.rise for a, b in zip(*rises, strict=True)]

    def _mean(self, values: Sequence[float | None], missing: float) -> float:
        """Return the weighted mean of one value per cell."""
        known = (missing if value is None else value for value in values)
        return sum(cell.weight * value for cell, value in zip(self.cells, known, strict=True))


# How the dense model and the baselines are measured, on any of the texts


def losses_of(measure: Measure, task: int, role: str) -> tuple[list[float], dict[str, list[float]]]:
    """Return a task's losses by window: dense, and under each baseline that can prune it."""
    criteria = [None, *map(named_metric, BASELINES)]
    dense, *measured = measure([(task, role, criterion) for criterion in criteria])
    assert dense is not None
    baselines = {name: losses for name, losses in zip(BASELINES, measured, strict=True) if losses}
    return dense, baselines


def cells_of(
    experiment: Experiment,
    task: int,
    role: str,
    dense: Sequence[float],
    baselines: Mapping[str, Sequence[float]],
) -> list[Cell]:
    """Return a task's cells on one of its texts, weighted by their numbers of windows."""
    # Tasks of weight 0 are only compared with one another.
    weights = [experiment.tasks[other].weight or 1 for other in experiment.tasks_of(role)]
    share = (experiment.tasks[task].weight or 1) / sum(weights)
    kinds = experiment.kinds_of(task, role)
    cells = []
    for kind in dict.fromkeys(kinds):
        windows = [place for place, other in enumerate(kinds) if other == kind]
        weight = share * len(windows) / len(kinds)
        cell = cell_of(task, kind, weight, windows, dense, baselines)
        cells.append(cell.model_copy(update={"model": experiment.tasks[task].model}))
    return cells


def scale_of(experiment: Experiment, measure: Measure, role: str = "fitness") -> Scale:
    """Measure the scale of one of the texts."""
    cells: list[Cell] = []
    tasks = experiment.tasks_of(role)
    losses: dict[str, list[list[float]]] = {
        name: [[] for _ in experiment.tasks] for name in BASELINES
    }
    for task in tasks:
        dense, baselines = losses_of(measure, task, role)
        cells += cells_of(experiment, task, role, dense, baselines)
        for name, measured in baselines.items():
            losses[name][task] = measured
    scale = Scale(cells=tuple(cells))
    whole = {name: one for name, one in losses.items() if all(one[task] for task in tasks)}
    fitness = {name: scale.fitness(one) for name, one in whole.items()}
    return scale.model_copy(update={"baselines": fitness})


def cell_of(
    task: int,
    text: str,
    weight: float,
    windows: Sequence[int],
    dense: Sequence[float],
    baselines: Mapping[str, Sequence[float]],
) -> Cell:
    """Return a cell from the losses of the dense model and baselines on the task's windows.

    Raises:
        ValueError: If no baseline was measured.
    """
    if not baselines:
        raise ValueError(f"no baseline can prune task {task}: there is nothing to compare with")
    base = [dense[i] for i in windows]
    rises = {name: [losses[i] - dense[i] for i in windows] for name, losses in baselines.items()}
    ranked = sorted(rises, key=lambda name: fmean(rises[name]))
    profiles = [rises[name] for name in ranked if fmean(rises[name]) >= _LEAST_RISE][:_PROFILED]
    shares = [[rise / fmean(part) for rise in part] for part in profiles] or [[1.0] * len(base)]
    best = rises[ranked[0]]
    # On few short windows the rise can be smaller than its error, and is then no unit either.
    error = _standard_error(best) or 0.0
    return Cell(
        task=task,
        text=text,
        weight=weight,
        windows=tuple(windows),
        dense=tuple(base),
        baseline=ranked[0],
        rise=max(_LEAST_RISE, error, fmean(best)),
        shares=tuple(max(_LEAST_SHARE, fmean(window)) for window in zip(*shares, strict=True)),
    )


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two lists of losses window by window: far less noisy than the losses themselves."""
    gaps = [a - b for a, b in zip(losses, reference, strict=True)]
    return Difference(fmean(gaps), _standard_error(gaps))


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for a single value."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None
