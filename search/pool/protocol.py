"""The interface between a search and its workers, wherever they run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from interrupts import Resumable
from pruning.criterion import Criterion
from pruning.progress import Progress
from search.fitness import ZerosAndOverlap
from search.population import Candidate, Outcome
from search.resident import unwatched
from search.scale import Scale

Timing = Mapping[str, float]
"""What is not reproducible about an evaluation: seconds, peak MiB, the worker's number."""

Count = Callable[[], None]
"""Called once for each answered request."""


def uncounted() -> None:
    """Count nothing."""


class PoolError(Resumable):
    """The workers are gone or unusable; the run can be resumed once they are back."""


class CallError(RuntimeError):
    """A call that the run cannot do without failed for a reason of its own, not a worker's.

    Attributes:
        trace: The traceback in the worker.
    """

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True)
class Arrival:
    """An outcome that arrived from a worker.

    Attributes:
        index: The candidate's index.
        timing: What is not reproducible.
        trace: The traceback of a candidate that failed, if there is one.
    """

    index: int
    outcome: Outcome
    timing: Timing
    trace: str = ""


@dataclass(frozen=True)
class Staff:
    """The workers of a pool.

    Attributes:
        ready: How many can evaluate.
        busy: How many of those are working.
        starting: How many are loading models or statistics.
        faults: Number of faults so far, by kind.
        trouble: The latest fault, in one line.
    """

    ready: int
    busy: int
    starting: int
    faults: Mapping[str, int]
    trouble: str


@dataclass(frozen=True)
class LossRequest:
    """Requests each window's loss on a task's text; the dense model's if the criterion is None."""

    task: int
    role: str
    criterion: Criterion | None


@dataclass(frozen=True)
class MaskRequest:
    """Requests a layer-by-layer comparison of two criteria's masks for a task."""

    task: int
    one: Criterion
    other: Criterion


class Pool(Protocol):
    """Workers that hold the models of a search and evaluate its candidates."""

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate without waiting."""

    def next_outcome(self) -> Arrival | None:
        """Return the outcome of a submitted candidate, or None if none arrives in half a second."""

    def collect_statistics(
        self, subject: int, progress: Progress = unwatched
    ) -> Mapping[str, Tensor]:
        """Collect a model's statistics, by `X/layer`.

        Args:
            progress: Called with the stage, blocks done and blocks in total, if the crew can tell.
        """

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a model's statistics to every worker; call it before any evaluation."""

    def use_scale(self, scale: Scale) -> None:
        """Give the scale of the fitness to every worker; call it before any evaluation."""

    def seconds_of_tasks(self) -> list[float]:
        """Return how long the first stage of each task takes."""

    def probe_tensors(self, subject: int) -> Mapping[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.probe`."""

    def model_digest(self, subject: int) -> str:
        """Return a hash of those dense weights of a model that get pruned."""

    def losses(
        self, requests: Sequence[LossRequest], done: Count = uncounted
    ) -> list[list[float] | None]:
        """Return each window's mean NLL in nats per token, for each request in order.

        On the fitness text this is the objective. None where the criterion is degenerate on the
        model.
        """

    def zeros_and_overlap(
        self, requests: Sequence[MaskRequest], done: Count = uncounted
    ) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""

    @property
    def staff(self) -> Staff:
        """The current workers, and the faults so far."""
