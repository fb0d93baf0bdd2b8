"""The surrogate: predicts how good a criterion is from the masks of those measured before.

Criteria that prune nearly the same weights have nearly the same loss, whatever their text. So a
Gaussian process over masks predicts how good a new one is, at the cost of a fingerprint and without
a model: a phenotypic characterisation as in Hildebrandt and Branke (2015, Evolutionary Computation
23(3), Section 3), with the regression of Rasmussen and Williams (2006, Algorithm 2.1). It chooses
which child of a brood to evaluate; a fitness is always measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pruning.criterion import Criterion
from search.population import Record

Sketch = npt.NDArray[np.uint8]
"""A sample of a criterion's mask bits on the probe, packed into bytes."""

_REMEMBERED = 1024
"""Number of latest measured criteria used, which bounds a prediction's time and memory."""

_REACH = 0.1
"""Distance over which the correlation of two masks' losses falls by a factor e: 0.03 to 0.1 predict
best, and 0.05 to 1 find good masks about equally soon."""

_NOISE = 0.03
"""Variance of a measured rank that its mask does not explain, as a fraction of the whole."""

_OPTIMISM = 0.5
"""Standard errors subtracted from a prediction: some, so that not only copies of the best are
chosen; with 1.5, good masks take twice the evaluations."""


@dataclass
class Surrogate:
    """Measured criteria, by ascending index.

    Attributes:
        sketch_of: Function that returns a criterion's sketch.
        alike: Masks that differ in a smaller fraction are one: a child with a mask that was
            measured already promises nothing.
    """

    sketch_of: Callable[[Criterion], Sketch]
    alike: float = 0.0
    _records: list[Record] = field(default_factory=list)
    _asked: list[int] = field(default_factory=list)
    _sketches: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0), np.uint8))
    _distances: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    _factor: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    _weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def learn(self, record: Record) -> None:
        """Add a record; those that were not measured are ignored."""
        if record.outcome.expected is not None:
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
        kept = len(known) - len(fresh)
        first = len(self._asked) - kept  # those before are forgotten
        sketches = [self.sketch_of(record.criterion) for record in fresh]
        distances = np.zeros((len(known), len(known)))
        distances[:kept, :kept] = self._distances[first:, first:]
        self._sketches = np.stack([*self._sketches[first:], *sketches])
        for place, sketch in enumerate(sketches, start=kept):
            distances[place] = distances[:, place] = self._distances_to(sketch)
        self._distances = distances
        self._asked = indices
        self._fit([record.outcome.expected for record in known])

    def predict(self, criterion: Criterion) -> float:
        """Return an optimistic rank among the remembered criteria: lower is more promising.

        A lower confidence bound of the rank's normal score: the Gaussian process's mean minus a
        part of its standard error, which is larger for masks unlike all measured ones. 0 while
        nothing has been measured; infinite for a mask that was measured already.
        """
        if not self._asked:
            return 0.0
        distances = self._distances_to(self.sketch_of(criterion))
        if distances.min() < self.alike:
            return math.inf
        correlations = _correlations(distances)
        spread = torch.linalg.solve_triangular(self._factor, correlations[:, None], upper=False)
        variance = max(0.0, 1.0 - float(spread.square().sum()))
        return float(correlations @ self._weights) - _OPTIMISM * math.sqrt(variance)

    def _distances_to(self, sketch: Sketch) -> npt.NDArray[np.float64]:
        differing = np.bitwise_count(self._sketches ^ sketch).sum(1, dtype=np.int64)
        return np.asarray(differing / (8 * sketch.size), dtype=np.float64)

    def _fit(self, losses: list[float | None]) -> None:
        # Ranks, not losses: what is hopeless must not outweigh the differences among the good.
        distinct, ranks = np.unique(np.array(losses, dtype=np.float64), return_inverse=True)
        scores = torch.special.ndtri(torch.from_numpy((ranks + 0.5) / len(distinct)))
        covariance = _correlations(self._distances)
        covariance.diagonal().add_(_NOISE)
        self._factor = torch.linalg.cholesky(covariance)
        self._weights = torch.cholesky_solve(scores[:, None], self._factor)[:, 0]


def _correlations(distances: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.exp(-distances / _REACH))
