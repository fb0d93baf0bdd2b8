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
from prunevolve.search.fingerprint import Words, differing_bits
from prunevolve.search.population import Record

_REMEMBERED = 512
"""Number of latest measured criteria used, which bounds a prediction's time and memory."""

_STEPS = 32
"""It is fitted anew when so much of what it knows is new: each time it knows less than this number
of criteria, then to every 2nd, 3rd, ... criterion more."""

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
        sketch_of: Function that returns a criterion's sketch, of its masks.
        weights: The weight of each task in the fitness; they add up to 1.
        alike: Masks that differ in a smaller fraction are one: a child with a mask that was
            measured already promises nothing.
    """

    sketch_of: Callable[[Criterion], Words]
    weights: Sequence[float] = (1.0,)
    alike: float = 0.0
    _records: list[Record] = field(default_factory=list)
    _dropped: int = 0
    _asked: list[int] = field(default_factory=list)
    _masks: Words = field(default_factory=lambda: np.empty((0, 0), np.uint64))
    _kernel: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    _fitted: "_Fit | None" = None

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
        known = self._records[: usable - oldest]
        indices = [record.index for record in known]
        if indices == self._asked:
            return
        fresh = [r for r in known if not self._asked or r.index > self._asked[-1]]
        self._asked = indices
        self._remember([self.sketch_of(record.criterion) for record in fresh], len(known))
        self._fitted = _Fit.to(self._kernel, [self._rise_of(record) for record in known])

    def _remember(self, masks: Sequence[Words], count: int) -> None:
        """Add masks, of which there is at least one, and keep the last `count` of all."""
        new = np.stack(masks)
        kept = count - len(new)
        gone = len(self._masks) - kept
        self._masks = np.concatenate([self._masks[gone:].reshape(-1, new.shape[1]), new])
        kernel = torch.ones(count, count, dtype=torch.float64)
        kernel[:kept, :kept] = self._kernel[gone:, gone:]
        for place in range(kept, count):
            row = _correlations(self._distances_to(self._masks[place]))
            kernel[place] = kernel[:, place] = row
        self._kernel = kernel

    def _rise_of(self, record: Record) -> float:
        """Return the mean relative rise over the tasks that were measured."""
        # Plain numbers: numpy's average takes ten times as long on so few, for each known record.
        pairs = zip(self.weights, record.outcome.rises, strict=True)
        known = [(weight, rise) for weight, rise in pairs if rise is not None]
        return sum(weight * rise for weight, rise in known) / sum(weight for weight, _ in known)

    def predict(self, criteria: Sequence[Criterion]) -> list[float]:
        """Return for each an optimistic loss relative to the remembered: lower is more promising.

        A lower confidence bound: the Gaussian process's mean minus a part of its standard error,
        which is larger for masks unlike all measured ones. 0 while nothing has been measured;
        infinite for a mask that was measured already.
        """
        if not self._fitted or not criteria:
            return [0.0] * len(criteria)
        distances = np.stack([self._distances_to(self.sketch_of(c)) for c in criteria], axis=1)
        promises = self._fitted.bounds(_correlations(distances))
        known = distances.min(0) < self.alike
        return [float(promise) for promise in np.where(known, math.inf, promises)]

    def _distances_to(self, mask: Words) -> npt.NDArray[np.float64]:
        """Return the fraction of bits in which each known mask differs from another, (known,)."""
        return np.asarray(differing_bits(self._masks, mask) / (8 * mask.nbytes), dtype=np.float64)


@dataclass(frozen=True)
class _Fit:
    """A Gaussian process fitted to losses: scale, Cholesky factor and coefficients."""

    mean: float
    deviation: float
    factor: Tensor
    coefficients: Tensor

    @staticmethod
    def to(kernel: Tensor, rises: Sequence[float]) -> "_Fit":
        """Fit to relative rises, given the correlations of their masks."""
        losses = _bounded(torch.tensor(rises, dtype=torch.float64))
        mean, deviation = float(losses.mean()), float(losses.std(correction=0)) or 1.0
        covariance = kernel.clone()
        covariance.diagonal().add_(_NOISE)
        factor = torch.linalg.cholesky(covariance)
        scores = ((losses - mean) / deviation)[:, None]
        return _Fit(mean, deviation, factor, torch.cholesky_solve(scores, factor)[:, 0])

    def bounds(self, correlations: Tensor) -> npt.NDArray[np.float64]:
        """Return the lower confidence bounds of masks, given their (known, masks) correlations."""
        spread = torch.linalg.solve_triangular(self.factor, correlations, upper=False)
        error = (1.0 - spread.square().sum(0)).clamp(min=0).sqrt()
        scores = correlations.T @ self.coefficients - _OPTIMISM * error
        return np.asarray((self.mean + self.deviation * scores).numpy())


def _bounded(rises: Tensor) -> Tensor:
    """Return rises on a scale from 0 to 1 that is steepest among the good ones.

    What is hopeless must not outweigh the differences among the good.
    """
    least = 1e-3
    rises = rises.clamp(min=least)
    return torch.sigmoid(_STEEPNESS * (rises / torch.quantile(rises, _GOOD)).log())


def _correlations(distances: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.exp(-distances / _REACH))
