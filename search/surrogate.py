"""The surrogate: predicts how good a criterion is from the masks of those measured before.

Criteria that prune nearly the same weights have nearly the same loss, whatever their text. So a
Gaussian process over masks predicts how good a new one is, at the cost of a fingerprint and without
a model: a phenotypic characterisation as in Hildebrandt and Branke (2015, Evolutionary Computation
23(3), Section 3), with the regression of Rasmussen and Williams (2006, Algorithm 2.1). Each task
has a process of its own, over the masks for that task: a candidate that one task has stopped tells
of this task alone. It chooses which child of a brood to evaluate; a fitness is always measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pruning.criterion import Criterion
from search.population import Record

Sketch = tuple[npt.NDArray[np.uint8], ...]
"""For each task a sample of a criterion's mask bits on the probe, packed into bytes."""

_REMEMBERED = 1024
"""Number of latest measured criteria used, which bounds a prediction's time and memory."""

_GOOD = 0.1
"""Share of the measured rises that are below the one at which differences count most."""

_STEEPNESS = 8
"""Power of a rise in the loss that is predicted: with 8 the good half is ranked better than with 4,
and 12 is no better."""

_REACH = 0.2
"""Distance over which the correlation of two masks' losses falls by a factor e: 0.05 to 1 find good
masks about equally soon."""

_NOISE = 0.1
"""Variance of a measured loss that its mask does not explain, as a fraction of the whole."""

_OPTIMISM = 0.5
"""Standard errors subtracted from a prediction: some, so that not only copies of the best are
chosen; with 1.5, good masks take twice the evaluations."""


@dataclass
class Surrogate:
    """Measured criteria, by ascending index.

    Attributes:
        sketch_of: Function that returns a criterion's sketch.
        weights: The weight of each task in the fitness; they add up to 1.
        worst: Share of the worst task in the fitness; the rest is the weighted mean.
        alike: Masks that differ in a smaller fraction are one: a child with a mask that was
            measured already promises nothing.
    """

    sketch_of: Callable[[Criterion], Sketch]
    weights: Sequence[float] = (1.0,)
    worst: float = 0.0
    alike: float = 0.0
    _records: list[Record] = field(default_factory=list)
    _asked: list[int] = field(default_factory=list)
    _processes: list["_Process"] = field(init=False)

    def __post_init__(self) -> None:
        self._processes = [_Process() for _ in self.weights]

    def learn(self, record: Record) -> None:
        """Add a record; those that were not measured are ignored."""
        if record.outcome.rises:
            self._records.append(record)

    def ask_before(self, committed: int) -> None:
        """Predict from records with indices below `committed` from now on; it must not decrease."""
        usable = sum(record.index < committed for record in self._records)
        self._records = self._records[max(0, usable - _REMEMBERED) :]
        known = [record for record in self._records if record.index < committed]
        indices = [record.index for record in known]
        if indices == self._asked:
            return
        fresh = [r for r in known if not self._asked or r.index > self._asked[-1]]
        forgotten = len(self._asked) - (len(known) - len(fresh))
        sketches = [self.sketch_of(record.criterion) for record in fresh]
        self._asked = indices
        for task, process in enumerate(self._processes):
            process.update(forgotten, [sketch[task] for sketch in sketches])
            process.fit([record.outcome.rises[task] for record in known])

    def predict(self, criterion: Criterion) -> float:
        """Return an optimistic loss relative to the remembered ones: lower is more promising.

        A lower confidence bound: the Gaussian process's mean minus a part of its standard error,
        which is larger for masks unlike all measured ones. 0 while nothing has been measured;
        infinite for a mask that was measured already.
        """
        if not self._asked:
            return 0.0
        sketch = self.sketch_of(criterion)
        distances = [
            process.distances_to(part)
            for process, part in zip(self._processes, sketch, strict=True)
        ]
        if np.mean(distances, axis=0).min() < self.alike:
            return math.inf
        bounds = [
            process.predict(part) for process, part in zip(self._processes, distances, strict=True)
        ]
        mean = sum(weight * bound for weight, bound in zip(self.weights, bounds, strict=True))
        return (1 - self.worst) * mean + self.worst * max(bounds)


class _Process:
    """A Gaussian process over the masks for one task."""

    def __init__(self) -> None:
        self._sketches = np.empty((0, 0), np.uint8)
        self._distances = np.empty((0, 0))
        self._measured = np.empty(0, np.int64)
        self._mean, self._deviation = 0.0, 1.0
        self._factor, self._coefficients = torch.empty(0, 0), torch.empty(0)

    def update(self, forgotten: int, sketches: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Drop the first masks and add others at the end."""
        kept = len(self._sketches) - forgotten
        distances = np.zeros((kept + len(sketches), kept + len(sketches)))
        distances[:kept, :kept] = self._distances[forgotten:, forgotten:]
        self._sketches = np.stack([*self._sketches[forgotten:], *sketches])
        for place, sketch in enumerate(sketches, start=kept):
            distances[place] = distances[:, place] = self.distances_to(sketch)
        self._distances = distances

    def fit(self, rises: Sequence[float | None]) -> None:
        """Fit to the relative rises of all masks; None for those not measured."""
        self._measured = np.array([i for i, rise in enumerate(rises) if rise is not None], np.int64)
        if not self._measured.size:
            return
        known = [rise for rise in rises if rise is not None]
        losses = _bounded(torch.tensor(known, dtype=torch.float64))
        self._mean, self._deviation = float(losses.mean()), float(losses.std(correction=0)) or 1.0
        scores = (losses - self._mean) / self._deviation
        covariance = _correlations(self._distances[np.ix_(self._measured, self._measured)])
        covariance.diagonal().add_(_NOISE)
        self._factor = torch.linalg.cholesky(covariance)
        self._coefficients = torch.cholesky_solve(scores[:, None], self._factor)[:, 0]

    def distances_to(self, sketch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Return the fraction of bits in which each mask differs from another."""
        differing = np.bitwise_count(self._sketches ^ sketch).sum(1, dtype=np.int64)
        return np.asarray(differing / (8 * sketch.size), dtype=np.float64)

    def predict(self, distances: npt.NDArray[np.float64]) -> float:
        """Return the lower confidence bound of a mask at these distances, 0 if nothing is known."""
        if not self._measured.size:
            return 0.0
        correlations = _correlations(distances[self._measured])
        spread = torch.linalg.solve_triangular(self._factor, correlations[:, None], upper=False)
        error = math.sqrt(max(0.0, 1.0 - float(spread.square().sum())))
        score = float(correlations @ self._coefficients) - _OPTIMISM * error
        return self._mean + self._deviation * score


def _bounded(rises: Tensor) -> Tensor:
    """Return rises on a scale from 0 to 1 that is steepest among the good ones.

    What is hopeless must not outweigh the differences among the good.
    """
    least = 1e-3
    rises = rises.clamp(min=least)
    return torch.sigmoid(_STEEPNESS * (rises / torch.quantile(rises, _GOOD)).log())


def _correlations(distances: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.exp(-distances / _REACH))
