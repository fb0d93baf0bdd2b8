"""The surrogate: predicts how good a criterion is from the masks of those measured before.

Criteria that prune nearly the same weights have nearly the same loss, whatever their text. So a
Gaussian process over masks predicts how good a new one is, at the cost of a fingerprint and without
a model: a phenotypic characterisation as in Hildebrandt and Branke (2015, Evolutionary Computation
23(3), Section 3), with the regression of Rasmussen and Williams (2006, Algorithm 2.1). Of a stopped
candidate the tasks that were measured count. It chooses which child of a brood to evaluate; a
fitness is always measured.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunevolve.pruning.metric import Criterion
from prunevolve.search.fingerprint import Words
from prunevolve.search.records import Record

_REMEMBERED, _STEPS = 512, 32
"""The latest measured criteria used, which bounds a prediction's time and memory; and how many it
is fitted to one by one: of more it waits for every 2nd, 3rd, ... one."""

_STEEPNESS, _LEAST = 8, 1e-3
"""Power of a rise in the loss that is predicted, and the least such rise: with 8 the good half is
ranked better than with 4, and 12 is no better."""

_REACH = 0.2
"""Distance over which the correlation of two masks' losses falls by a factor e: 0.05 to 1 find good
masks about equally soon."""

_GOOD = 0.1  # share of the measured rises that are below the one at which differences count most
_NOISE = 0.1  # variance of a loss that its mask does not explain, as a fraction of the whole

_OPTIMISM = 0.5
"""Standard errors subtracted from a prediction: some, so that not only copies of the best are
chosen; with 1.5, good masks take twice the evaluations."""


@dataclass
class Surrogate:
    """Measured criteria, by ascending index."""

    sketch_of: Callable[[Criterion], Words]  # of its masks
    weights: Sequence[float] = (1.0,)  # of the tasks in the fitness
    alike: float = 0.0  # masks that differ in a smaller fraction are one, which promises nothing
    _records: list[Record] = field(default_factory=list)
    _dropped: int = 0  # records before these
    _fitted: list[Record] = field(default_factory=list)
    _sketches: Words = field(default_factory=lambda: np.empty((0, 0), np.uint64))
    _bounds: Callable[[Tensor], Tensor] | None = None

    def learn(self, record: Record) -> None:
        """Add a record; those that were not measured are ignored."""
        if any(rise is not None for rise in record.outcome.rises):
            self._records.append(record)

    def ask_before(self, committed: int) -> None:
        """Predict from records with indices below `committed` from now on; it must not decrease."""
        usable = self._dropped + bisect_left(self._records, committed, key=lambda r: r.index)
        usable -= usable % (1 + min(usable, _REMEMBERED) // _STEPS)
        oldest = max(self._dropped, usable - _REMEMBERED)
        self._records, self._dropped = self._records[oldest - self._dropped :], oldest
        records = self._records[: usable - oldest]
        if records != self._fitted:
            self._fitted = records
            self._sketches = np.stack([self.sketch_of(record.criterion) for record in records])
            kernel = torch.stack([_correlations(self._distances(s)) for s in self._sketches])
            self._bounds = _fit(kernel, [self._rise_of(record) for record in records])

    def _rise_of(self, record: Record) -> float:
        """Return the mean relative rise over the tasks that were measured."""
        pairs = zip(self.weights, record.outcome.rises, strict=True)
        seen = [(weight, rise) for weight, rise in pairs if rise is not None]
        return sum(weight * rise for weight, rise in seen) / sum(weight for weight, _ in seen)

    def predict(self, criteria: Sequence[Criterion]) -> list[float]:
        """Return for each a lower confidence bound of its loss, relative to the remembered: the
        Gaussian process's mean minus a part of its standard error, which is larger for masks unlike
        all measured ones. 0 while nothing was measured; infinite for a mask that was.
        """
        if not self._bounds or not criteria:
            return [0.0] * len(criteria)
        distances = np.stack([self._distances(self.sketch_of(c)) for c in criteria], axis=1)
        bounds = self._bounds(_correlations(distances)).numpy()
        return [float(x) for x in np.where(distances.min(0) < self.alike, math.inf, bounds)]

    def _distances(self, sketch: Words) -> npt.NDArray[np.float64]:
        """Return the fraction of bits in which each fitted sketch differs from one, (fitted,)."""
        differing = np.bitwise_count(self._sketches ^ sketch).sum(1, dtype=np.int64)
        return np.asarray(differing / (8 * sketch.nbytes))


def _fit(kernel: Tensor, rises: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Fit a Gaussian process to relative rises, given the correlations of their masks; return what
    gives the lower confidence bounds of other masks by their correlations, (fitted, others).

    Losses are the rises on a scale from 0 to 1 that is steepest among the good ones: what is
    hopeless must not outweigh the differences among the good.
    """
    positive = torch.tensor(rises, dtype=torch.float64).clamp(min=_LEAST)
    losses = torch.sigmoid(_STEEPNESS * (positive / torch.quantile(positive, _GOOD)).log())
    mean, deviation = losses.mean(), float(losses.std(correction=0)) or 1.0
    factor = torch.linalg.cholesky(kernel + _NOISE * torch.eye(len(kernel), dtype=kernel.dtype))
    coefficients = torch.cholesky_solve(((losses - mean) / deviation)[:, None], factor)[:, 0]

    def bounds(correlations: Tensor) -> Tensor:
        spread = torch.linalg.solve_triangular(factor, correlations, upper=False)
        error = (1.0 - spread.square().sum(0)).clamp(min=0).sqrt()
        bound: Tensor = mean + deviation * (correlations.T @ coefficients - _OPTIMISM * error)
        return bound

    return bounds


def _correlations(distances: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.exp(-distances / _REACH))
