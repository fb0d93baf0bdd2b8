"""The surrogate: predicts how good a criterion is from the masks of those measured before.

Criteria that prune nearly the same weights have nearly the same loss, whatever their text. So a few
measured neighbours predict how good a new mask is, at the cost of a fingerprint and without a
model: a phenotypic characterisation as in Hildebrandt and Branke (2015, Evolutionary Computation
23(3), Section 3). It chooses which child of a brood to evaluate; a fitness is always measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pruning.criterion import Criterion
from search.population import Record

Sketch = npt.NDArray[np.uint8]
"""A sample of a criterion's mask bits on the probe, packed into bytes."""

_NEIGHBOURS = 5
_REMEMBERED = 1024
"""Number of latest measured criteria used, which bounds a prediction's time and memory."""

_ONE_MASK = 0.001
"""Distance below which two masks count as equal."""

_UNKNOWN = 1.0
"""How far a mask at distance 1 from all measured ones may outrank its neighbours, as a fraction of
all ranks: without it, the chosen child of a brood would be a copy of the best."""


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
    _ranks: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def learn(self, record: Record) -> None:
        """Add a record; those that were not measured are ignored."""
        if record.outcome.expected is not None:
            self._records.append(record)

    def ask_before(self, committed: int) -> None:
        """Predict from records with indices below `committed` from now on; it must not decrease."""
        usable = sum(record.index < committed for record in self._records)
        self._records = self._records[max(0, usable - _REMEMBERED) :]
        asked = [record for record in self._records if record.index < committed]
        indices = [record.index for record in asked]
        if indices == self._asked:
            return
        kept = dict(zip(self._asked, self._sketches, strict=True))
        sketches = [
            kept[record.index] if record.index in kept else self.sketch_of(record.criterion)
            for record in asked
        ]
        self._asked, self._sketches = indices, np.stack(sketches)
        values = np.array([record.outcome.expected for record in asked])
        self._ranks = values.argsort(kind="stable").argsort() / len(values)

    def predict(self, criterion: Criterion) -> float:
        """Return an optimistic rank among the remembered criteria: lower is more promising.

        It is a lower confidence bound: the mean of the nearest masks' ranks (0 is the best, 1 the
        worst), weighted by inverse squared distance, minus a margin that grows with the distance to
        the nearest. Summed in a fixed order, so that it is the same on any machine. 0 while nothing
        has been measured.
        """
        if not self._asked:
            return 0.0
        sketch = self.sketch_of(criterion)
        differing = np.bitwise_count(self._sketches ^ sketch).sum(1, dtype=np.int64)
        distances = differing / (8 * sketch.size)
        nearest = distances.argsort(kind="stable")[:_NEIGHBOURS].tolist()
        if distances[nearest[0]] < self.alike:
            return 1.0
        total = weights = 0.0
        for i in nearest:
            weight = 1 / (float(distances[i]) + _ONE_MASK) ** 2
            total += weight * float(self._ranks[i])
            weights += weight
        return total / weights - _UNKNOWN * float(distances[nearest[0]])
