"""The unit of fitness: the rise of the best named metric on the same windows.

A cell is one kind of text for one task. Its value is the candidate's rise in loss over the dense
model, divided by the rise of the best named metric there: below 1 is better than any known metric.
So cells of any model, sparsity and text share one scale. An experiment with a single cell needs
none: its fitness is the loss itself, which ranks candidates in the same order.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

_LEAST_RISE = 0.001
"""Nats per token. A smaller rise is rounding noise, and cannot serve as a unit."""

_LEAST_SHARE = 0.1
"""Lower limit of a window's share, so that one that hardly suffers, or gains, is no divisor."""

_PROFILED = 2
"""Number of the best named metrics from which the shares of a cell's windows are estimated."""

_Losses = Annotated[tuple[float, ...], Field(min_length=1)]


def unit_of(cells: int) -> str:
    """Return the unit of a fitness over this many cells."""
    return "nats/token" if cells == 1 else "x best named"


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Values):
    """One kind of text for one task, with the losses of the dense model and the named metrics.

    Attributes:
        task: Index of the task.
        text: The kind of text.
        weight: Weight in the mean over all cells; the weights add up to 1.
        windows: Indices of its windows among the task's.
        dense: The dense model's loss on each window, nats per token.
        named: The best named metric.
        rise: Rise of that metric's mean loss over dense, nats per token, or its standard error if
            that is larger.
        shares: Typical rise of each window under pruning, as a multiple of the mean.
        losses_of_named: Mean loss of each named metric, nats per token.
    """

    task: int = Field(ge=0)
    text: str
    weight: float = Field(gt=0)
    windows: tuple[int, ...] = Field(min_length=1)
    dense: _Losses
    named: str
    rise: float = Field(ge=_LEAST_RISE)
    shares: _Losses
    losses_of_named: dict[str, float]

    @model_validator(mode="after")
    def _check(self) -> "Cell":
        if not len(self.windows) == len(self.dense) == len(self.shares):
            raise ValueError("windows, dense and shares must have equal lengths")
        return self

    def rises(self, losses: Sequence[float]) -> list[float]:
        """Return the rises over dense, nats per token, on its windows evaluated so far.

        Args:
            losses: Losses on the task's first windows, in order.
        """
        seen = self.seen(losses)
        return [
            losses[i] - dense for i, dense in zip(self.windows[:seen], self.dense, strict=False)
        ]

    def seen(self, losses: Sequence[float]) -> int:
        """Return how many of its windows are among the task's first ones."""
        return sum(i < len(losses) for i in self.windows)

    def value(self, losses: Sequence[float]) -> float | None:
        """Return the relative rise estimated from the windows evaluated so far, or None."""
        rises = self.rises(losses)
        if not rises:
            return None
        share = 1.0 if len(rises) == len(self.dense) else fmean(self.shares[: len(rises)])
        return fmean(rises) / share / self.rise


def cell_of(
    task: int,
    text: str,
    weight: float,
    windows: Sequence[int],
    dense: Sequence[float],
    named: dict[str, Sequence[float]],
) -> Cell:
    """Return a cell from the losses of the dense model and named metrics on the task's windows.

    Raises:
        ValueError: If no named metric was measured.
    """
    if not named:
        raise ValueError(f"no named metric can prune task {task}: there is nothing to compare with")
    base = [dense[i] for i in windows]
    rises = {name: [losses[i] - dense[i] for i in windows] for name, losses in named.items()}
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
        named=ranked[0],
        rise=max(_LEAST_RISE, error, fmean(best)),
        shares=tuple(max(_LEAST_SHARE, fmean(window)) for window in zip(*shares, strict=True)),
        losses_of_named={name: fmean(losses[i] for i in windows) for name, losses in named.items()},
    )


@dataclass(frozen=True)
class Difference:
    """A paired difference between two metrics over the same windows.

    Attributes:
        mean: Mean difference, positive if the first is worse.
        standard_error: Standard error of the mean; None if a cell has a single window.
    """

    mean: float
    standard_error: float | None


class Scale(_Values):
    """All cells, in the order of the tasks; the weighted mean of their values is the fitness."""

    cells: tuple[Cell, ...] = Field(min_length=1)

    def values(self, losses: Sequence[Sequence[float]]) -> list[float | None]:
        """Return each cell's value, from the losses of each task's first windows."""
        return [cell.value(losses[cell.task]) for cell in self.cells]

    def rises_by_task(self, losses: Sequence[Sequence[float]]) -> tuple[float | None, ...]:
        """Return each task's relative rise, of its kinds of text evaluated so far; None if none."""
        rises: list[float | None] = []
        for task in sorted({cell.task for cell in self.cells}):
            cells = [cell for cell in self.cells if cell.task == task]
            seen = [(cell.weight, cell.value(losses[task])) for cell in cells]
            known = [(weight, value) for weight, value in seen if value is not None]
            total = sum(weight for weight, _ in known)
            rises.append(sum(weight * value for weight, value in known) / total if known else None)
        return tuple(rises)

    def mean(self, values: Sequence[float]) -> float:
        """Return the weighted mean of one value per cell."""
        return sum(c.weight * value for c, value in zip(self.cells, values, strict=True))

    def fitness(self, losses: Sequence[Sequence[float]]) -> float:
        """Return the fitness from the losses of all windows of each task."""
        if len(self.cells) == 1:
            return fmean(losses[self.cells[0].task])
        return self.mean(self._known(losses))

    def expected(self, losses: Sequence[Sequence[float]]) -> float:
        """Return the fitness estimated from the windows evaluated so far.

        Cells not evaluated yet are assumed to equal the mean of the others.
        """
        mean = fmean(self._known(losses))
        value = self.mean([mean if v is None else v for v in self.values(losses)])
        cell = self.cells[0]
        return fmean(cell.dense) + value * cell.rise if len(self.cells) == 1 else value

    def relative(self, fitness: float) -> float:
        """Return a fitness as a relative rise."""
        cell = self.cells[0]
        return (fitness - fmean(cell.dense)) / cell.rise if len(self.cells) == 1 else fitness

    @property
    def dense_fitness(self) -> float:
        """The fitness of the dense model."""
        return fmean(self.cells[0].dense) if len(self.cells) == 1 else 0.0

    @property
    def named_fitness(self) -> dict[str, float]:
        """The fitness of each named metric that can prune for every task.

        With several cells also that of a hypothetical metric equal to the best named in each cell.
        """
        several = len(self.cells) > 1
        dense = [fmean(cell.dense) for cell in self.cells]
        fitness = {"best named of each": 1.0} if several else {}
        for name in self.cells[0].losses_of_named:
            losses = [cell.losses_of_named.get(name) for cell in self.cells]
            known = [loss for loss in losses if loss is not None]
            if len(known) == len(self.cells):
                values = zip(known, dense, self.cells, strict=True)
                rises = [(loss - base) / cell.rise for loss, base, cell in values]
                fitness[name] = self.mean(rises) if several else known[0]
        return fitness

    def digest(self) -> str:
        """Return a hash of everything that affects a fitness."""
        text = self.model_dump_json(exclude={"cells": {"__all__": {"losses_of_named"}}})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def excess(
        self, losses: Sequence[Sequence[float]], limit: float, slack: float
    ) -> tuple[float, float] | None:
        """Return the estimated relative rise and its threshold if the estimate exceeds it.

        Cells not evaluated yet are assumed to equal the limit.

        Args:
            limit: The relative rise to beat, 0 or more.
            slack: Tolerance for the value of a single window, as a fraction.
        """
        values = [limit if value is None else value for value in self.values(losses)]
        seen = [max(1, cell.seen(losses[cell.task])) for cell in self.cells]
        error = math.sqrt(sum(c.weight**2 / n for c, n in zip(self.cells, seen, strict=True)))
        rise, threshold = self.mean(values), limit * (1 + slack * error)
        return (rise, threshold) if rise > threshold else None

    def difference(
        self, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> Difference:
        """Return how much worse a fitness is than the reference's, with its standard error."""
        parts, errors = [], []
        for cell in self.cells:
            unit = 1.0 if len(self.cells) == 1 else cell.rise
            rises = (cell.rises(by_task[cell.task]) for by_task in (losses, reference))
            gaps = [(cell.weight * a - cell.weight * b) / unit for a, b in zip(*rises, strict=True)]
            parts.append(fmean(gaps))
            errors.append(_standard_error(gaps))
        known = [error for error in errors if error is not None]
        return Difference(sum(parts), math.hypot(*known) if len(known) == len(errors) else None)

    def _known(self, losses: Sequence[Sequence[float]]) -> list[float]:
        """Return the values of the cells evaluated so far."""
        return [value for value in self.values(losses) if value is not None]


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two lists of losses window by window: far less noisy than the losses themselves."""
    gaps = [a - b for a, b in zip(losses, reference, strict=True)]
    return Difference(fmean(gaps), _standard_error(gaps))


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for a single value."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None
