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
from search.fingerprint import Words
from search.population import Record

_REMEMBERED = 512
"""Number of latest measured criteria used, which bounds a prediction's time and memory."""

_STEPS = 32
"""The processes are fitted anew when so much of what they know is new: each time they know less
than this number of criteria, then to every 2nd, 3rd, ... criterion more."""

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
        alike: Masks that differ in a smaller fraction are one: a child with a mask that was
            measured already promises nothing.
    """

    sketch_of: Callable[[Criterion], Sequence[Words]]
    weights: Sequence[float] = (1.0,)
    alike: float = 0.0
    _records: list[Record] = field(default_factory=list)
    _dropped: int = 0
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
        usable = self._dropped + sum(record.index < committed for record in self._records)
        usable -= usable % (1 + min(usable, _REMEMBERED) // _STEPS)
        oldest = max(self._dropped, usable - _REMEMBERED)
        self._records, self._dropped = self._records[oldest - self._dropped :], oldest
        known = self._records[: usable - oldest]
        indices = [record.index for record in known]
        if indices == self._asked:
            return
        fresh = [r for r in known if not self._asked or r.index > self._asked[-1]]
        forgotten = len(self._asked) - (len(known) - len(fresh))
        sketches = [self.sketch_of(record.criterion) for record in fresh]
        self._asked = indices
        for task, process in enumerate(self._processes):
            rises = [record.outcome.rises[task] for record in known]
            process.update(forgotten, [sketch[task] for sketch in sketches], rises)

    def predict(self, criteria: Sequence[Criterion]) -> list[float]:
        """Return for each an optimistic loss relative to the remembered: lower is more promising.

        A lower confidence bound: the Gaussian process's mean minus a part of its standard error,
        which is larger for masks unlike all measured ones. 0 while nothing has been measured;
        infinite for a mask that was measured already.
        """
        if not self._asked or not criteria:
            return [0.0] * len(criteria)
        sketches = zip(*map(self.sketch_of, criteria), strict=True)
        distances, bounds = [], []
        for process, masks in zip(self._processes, sketches, strict=True):
            distances.append(np.stack([process.distances_to(mask) for mask in masks], axis=1))
            bounds.append(process.predict(distances[-1]))
        promises = np.average(bounds, axis=0, weights=self.weights)
        known = np.mean(distances, axis=0).min(0) < self.alike
        return [float(promise) for promise in np.where(known, math.inf, promises)]


class _Process:
    """A Gaussian process over the masks for one task."""

    def __init__(self) -> None:
        self._masks = np.empty((0, 0), np.uint64)
        self._measured = np.empty(0, np.int64)
        self._kernel = torch.empty(0, 0, dtype=torch.float64)
        self._mean, self._deviation = 0.0, 1.0
        self._factor, self._coefficients = torch.empty(0, 0), torch.empty(0)

    def update(self, forgotten: int, masks: Sequence[Words], rises: Sequence[float | None]) -> None:
        """Drop the first masks, add others at the end, and fit to all relative rises.

        Args:
            forgotten: How many go.
            masks: Those that come, at least one.
            rises: Of all masks that are known then; None for those not measured.
        """
        new = np.stack(masks)
        self._masks = np.concatenate([self._masks[forgotten:].reshape(-1, new.shape[1]), new])
        gone = int(np.searchsorted(self._measured, forgotten))
        kept, old = self._kernel[gone:, gone:], len(self._measured) - gone
        self._measured = np.array([i for i, rise in enumerate(rises) if rise is not None], np.int64)
        changed = gone or len(self._measured) > old
        if not changed:
            return
        self._kernel = torch.ones(2 * (len(self._measured),), dtype=torch.float64)
        self._kernel[:old, :old] = kept
        for place in range(old, len(self._measured)):
            mask = self._masks[self._measured[place]]
            row = _correlations(self.distances_to(mask))[self._measured]
            self._kernel[place] = self._kernel[:, place] = row
        if self._measured.size:
            self._fit([rise for rise in rises if rise is not None])

    def _fit(self, rises: list[float]) -> None:
        losses = _bounded(torch.tensor(rises, dtype=torch.float64))
        self._mean, self._deviation = float(losses.mean()), float(losses.std(correction=0)) or 1.0
        scores = (losses - self._mean) / self._deviation
        covariance = self._kernel.clone()
        covariance.diagonal().add_(_NOISE)
        self._factor = torch.linalg.cholesky(covariance)
        self._coefficients = torch.cholesky_solve(scores[:, None], self._factor)[:, 0]

    def distances_to(self, mask: Words) -> npt.NDArray[np.float64]:
        """Return the fraction of bits in which each known mask differs from another, (known,)."""
        differing = np.bitwise_count(self._masks ^ mask).sum(1, dtype=np.int64)
        return np.asarray(differing / (8 * mask.nbytes), dtype=np.float64)

    def predict(self, distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the lower confidence bounds of masks, (masks,), 0 if nothing is known.

        Args:
            distances: To the known masks, (known, masks).
        """
        if not self._measured.size:
            return np.zeros(distances.shape[1])
        correlations = _correlations(distances[self._measured])
        spread = torch.linalg.solve_triangular(self._factor, correlations, upper=False)
        error = (1.0 - spread.square().sum(0)).clamp(min=0).sqrt()
        scores = correlations.T @ self._coefficients - _OPTIMISM * error
        return np.asarray((self._mean + self._deviation * scores).numpy())


def _bounded(rises: Tensor) -> Tensor:
    """Return rises on a scale from 0 to 1 that is steepest among the good ones.

    What is hopeless must not outweigh the differences among the good.
    """
    least = 1e-3
    rises = rises.clamp(min=least)
    return torch.sigmoid(_STEEPNESS * (rises / torch.quantile(rises, _GOOD)).log())


def _correlations(distances: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.exp(-distances / _REACH))
