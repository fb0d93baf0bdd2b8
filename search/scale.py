"""What a fitness is measured in: the rise of the best named metric on the same windows.

A cell is one kind of text under one task. Its value is the candidate's rise of the loss over the
dense model, divided by the rise of the named metric that does best there: below 1 is better than
what is known. So cells of any model, sparsity and text have one scale. An experiment of a single
cell needs none: its fitness is the loss itself, which ranks candidates in the same order.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Aggregate = Literal["mean", "worst", "mean of the two"]

_LEAST_RISE = 0.001
"""Nats per token. A rise below it is rounding, and no unit to measure another in."""

_LEAST_SHARE = 0.1
"""A window that hardly suffers, or gains, says little: no division by next to nothing."""

_PROFILED = 2
"""How many of the best named metrics tell how the windows of a cell differ under any pruning."""

_Losses = Annotated[tuple[float, ...], Field(min_length=1)]


def unit_of(cells: int) -> str:
    """Return what a fitness over so many cells is in."""
    return "nats/token" if cells == 1 else "x best named"


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Values):
    """One kind of text under one task, as the dense model and the named metrics fare on it.

    Attributes:
        task: Index of the task.
        text: The kind of text.
        weight: In the mean over all cells, where they add up to 1.
        windows: Places of its windows among the task's.
        dense: The dense model's loss on each, nats per token.
        named: The named metric that does best.
        rise: Of that metric's mean loss over dense, nats per token; its standard error if that is
            more.
        shares: What each window suffers under any pruning, as a multiple of the mean.
        losses_of_named: The mean loss of each named metric, nats per token; empty in an older file.
    """

    task: int = Field(ge=0)
    text: str
    weight: float = Field(gt=0)
    windows: tuple[int, ...] = Field(min_length=1)
    dense: _Losses
    named: str
    rise: float = Field(ge=_LEAST_RISE)
    shares: _Losses
    losses_of_named: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> "Cell":
        if not len(self.windows) == len(self.dense) == len(self.shares):
            raise ValueError("windows, dense and shares must be equally many")
        return self

    def rises(self, losses: Sequence[float]) -> list[float]:
        """Return the rises over dense, nats per token, of those of its windows that were seen.

        Args:
            losses: Of the task's first windows, in order.
        """
        seen = self.seen(losses)
        return [
            losses[i] - dense for i, dense in zip(self.windows[:seen], self.dense, strict=False)
        ]

    def seen(self, losses: Sequence[float]) -> int:
        """Return how many of its windows are among the task's first ones."""
        return sum(i < len(losses) for i in self.windows)

    def value(self, losses: Sequence[float]) -> float | None:
        """Return the relative rise that the windows seen let expect of all; None if none was."""
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
    """Return a cell from the losses of dense model and named metrics on the task's windows.

    Raises:
        ValueError: If no named metric was measured.
    """
    if not named:
        raise ValueError(f"no named metric can prune task {task}: there is nothing to compare with")
    base = [dense[i] for i in windows]
    rises = {name: [losses[i] - dense[i] for i in windows] for name, losses in named.items()}
    ranked = sorted(rises, key=lambda name: fmean(rises[name]))
    tell = [rises[name] for name in ranked if fmean(rises[name]) >= _LEAST_RISE][:_PROFILED]
    shares = [[rise / fmean(part) for rise in part] for part in tell] or [[1.0] * len(base)]
    best = rises[ranked[0]]
    # On few short windows a rise can be less than what it may be off: no unit either.
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
    """A paired difference of two metrics over the same windows.

    Attributes:
        mean: Positive where the first is worse.
        standard_error: Of that mean; None where a cell has a single window.
    """

    mean: float
    standard_error: float | None


class Scale(_Values):
    """All cells, and how their values become one number.

    Attributes:
        aggregate: The weighted mean of the cells, the worst of them, or the mean of these two.
        order: Tasks in the order in which they are looked at.
        cells: In the order of the tasks.
    """

    aggregate: Aggregate
    order: tuple[int, ...]
    cells: tuple[Cell, ...] = Field(min_length=1)

    def values(self, losses: Sequence[Sequence[float]]) -> list[float | None]:
        """Return each cell's value, from the losses of each task's first windows."""
        return [cell.value(losses[cell.task]) for cell in self.cells]

    def slopes(self, values: Sequence[float]) -> list[float]:
        """Return what each cell weighs in the aggregate at these values; they add up to 1."""
        means = [cell.weight for cell in self.cells]
        if self.aggregate == "mean":
            return means
        worst = [0.0] * len(values)
        worst[max(range(len(values)), key=lambda i: values[i])] = 1.0
        if self.aggregate == "worst":
            return worst
        return [(one + other) / 2 for one, other in zip(means, worst, strict=True)]

    def aggregated(self, values: Sequence[float]) -> float:
        """Return the relative rise of all cells together."""
        return sum(s * value for s, value in zip(self.slopes(values), values, strict=True))

    def fitness(self, losses: Sequence[Sequence[float]]) -> float:
        """Return the fitness from the losses of all windows of each task."""
        if len(self.cells) == 1:
            return fmean(losses[self.cells[0].task])
        return self.aggregated(self._known(losses))

    def expected(self, losses: Sequence[Sequence[float]]) -> float:
        """Return the fitness that the windows so far let expect.

        Cells that were not looked at yet are taken to be as good as the mean of the others.
        """
        mean = fmean(self._known(losses))
        value = self.aggregated([mean if v is None else v for v in self.values(losses)])
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
        """The fitness of each named metric that could prune every task, as far as it was kept.

        Over several cells also that of one which is the best named metric in each of them.
        """
        several = len(self.cells) > 1
        dense = [fmean(cell.dense) for cell in self.cells]
        if not several and not self.cells[0].losses_of_named:
            return {self.cells[0].named: dense[0] + self.cells[0].rise}
        found = {"best named of each": 1.0} if several else {}
        for name in self.cells[0].losses_of_named:
            losses = [cell.losses_of_named.get(name) for cell in self.cells]
            known = [loss for loss in losses if loss is not None]
            if len(known) == len(self.cells):
                values = zip(known, dense, self.cells, strict=True)
                rises = [(loss - base) / cell.rise for loss, base, cell in values]
                found[name] = self.aggregated(rises) if several else known[0]
        return found

    def digest(self) -> str:
        """Return a hash of all that decides a fitness."""
        decides = self.model_dump_json(exclude={"cells": {"__all__": {"losses_of_named"}}})
        return hashlib.sha256(decides.encode()).hexdigest()[:16]

    def excess(
        self, losses: Sequence[Sequence[float]], limit: float, slack: float
    ) -> tuple[float, float] | None:
        """Return the expected relative rise and what it may be, if it is more than that.

        Cells that were not looked at yet are taken to be as good as the limit.

        Args:
            limit: The relative rise to beat, 0 or more.
            slack: What one window's value may be off, as a fraction.
        """
        values = [limit if value is None else value for value in self.values(losses)]
        slopes = self.slopes(values)
        seen = [max(1, cell.seen(losses[cell.task])) for cell in self.cells]
        off = math.sqrt(sum(s * s / n for s, n in zip(slopes, seen, strict=True)))
        rise, most = self.aggregated(values), limit * (1 + slack * off)
        return (rise, most) if rise > most else None

    def difference(
        self, losses: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> Difference:
        """Return how much worse than another a fitness is, with its error to first order."""
        parts, errors = [], []
        weights = [self.slopes(self._known(own)) for own in (losses, reference)]
        for cell, one, other in zip(self.cells, *weights, strict=True):
            unit = 1.0 if len(self.cells) == 1 else cell.rise
            pairs = (cell.rises(own[cell.task]) for own in (losses, reference))
            gaps = [(one * a - other * b) / unit for a, b in zip(*pairs, strict=True)]
            parts.append(fmean(gaps))
            errors.append(_standard_error(gaps))
        known = [error for error in errors if error is not None]
        return Difference(sum(parts), math.hypot(*known) if len(known) == len(errors) else None)

    def _known(self, losses: Sequence[Sequence[float]]) -> list[float]:
        """Return the values of the cells that were looked at."""
        return [value for value in self.values(losses) if value is not None]


def paired_difference(losses: Sequence[float], reference: Sequence[float]) -> Difference:
    """Compare two lists of losses window by window: far less noise than in the losses."""
    gaps = [one - other for one, other in zip(losses, reference, strict=True)]
    return Difference(fmean(gaps), _standard_error(gaps))


def _standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean; None for a single value."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None
