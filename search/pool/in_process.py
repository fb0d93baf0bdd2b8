"""Evaluations in this process, one when asked: for tests and for `ray.workers: 0`."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from search.fitness import Evaluator, ZerosAndOverlap, timed
from search.pool.protocol import Arrival, LossRequest, MaskRequest
from search.population import Candidate


@dataclass
class InProcessPool:
    """A pool of the one evaluator that it is given."""

    evaluator: Evaluator
    waiting: deque[Candidate] = field(default_factory=deque)

    def submit(self, candidate: Candidate) -> None:
        """Take a candidate; it is evaluated when an outcome is asked for."""
        self.waiting.append(candidate)

    def next_outcome(self) -> Arrival | None:
        """Evaluate the oldest submitted candidate."""
        if not self.waiting:
            return None
        candidate = self.waiting.popleft()
        outcome, timing = timed(self.evaluator, candidate)
        return Arrival(candidate.index, outcome, timing | {"worker": 0})

    def collect_statistics(self, subject: int) -> Mapping[str, Tensor]:
        """Collect a model's statistics, by `X/layer`."""
        return self.evaluator.collect_statistics(subject)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a model's statistics to the evaluator."""
        self.evaluator.use_statistics(subject, tensors)

    def probe_tensors(self, subject: int) -> Mapping[str, Tensor]:
        """Return the fingerprint's probe of a model."""
        return self.evaluator.probe_tensors(subject)

    def model_digest(self, subject: int) -> str:
        """Return a hash of a model's dense weights that are pruned."""
        return self.evaluator.model_digest(subject)

    def losses(self, requests: Sequence[LossRequest]) -> list[list[float] | None]:
        """Return each window's mean NLL, for each request in order."""
        return [self.evaluator.losses(r.task, r.role, r.criterion) for r in requests]

    def zeros_and_overlap(self, requests: Sequence[MaskRequest]) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""
        return [self.evaluator.zeros_and_overlap(r.task, r.one, r.other) for r in requests]
