"""What a search asks of its workers, wherever they are."""

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
"""What is not reproducible of an evaluation: seconds, peak MiB, the worker's number."""

Count = Callable[[], None]
"""Is called once for each request that is answered."""


def uncounted() -> None:
    """Count nothing: nobody watches."""


class PoolError(Resumable):
    """The workers are no more, or of no use: a run can be resumed when they are back."""


class CallError(RuntimeError):
    """A call that a run cannot do without failed for a reason of its own.

    Attributes:
        trace: The traceback in the worker.
    """

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True)
class Arrival:
    """An outcome that came back.

    Attributes:
        index: Of its candidate.
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
        ready: How many can work.
        busy: How many of them do.
        starting: How many load their models.
        faults: What went wrong so far, by kind.
        trouble: The last of it, in one line.
    """

    ready: int
    busy: int
    starting: int
    faults: Mapping[str, int]
    trouble: str


@dataclass(frozen=True)
class LossRequest:
    """Asks for the losses of a task's text by window: dense if the criterion is None."""

    task: int
    role: str
    criterion: Criterion | None


@dataclass(frozen=True)
class MaskRequest:
    """Asks to compare two criteria's masks under a task, layer by layer."""

    task: int
    one: Criterion
    other: Criterion


class Pool(Protocol):
    """Workers that hold the models of a search and evaluate its candidates."""

    def submit(self, candidate: Candidate) -> None:
        """Take a candidate; does not wait."""

    def next_outcome(self) -> Arrival | None:
        """Return some submitted candidate's outcome, or None if none came in half a second."""

    def collect_statistics(
        self, subject: int, progress: Progress = unwatched
    ) -> Mapping[str, Tensor]:
        """Collect a model's statistics, by `X/layer`.

        Args:
            progress: Takes stage, blocks done and blocks in all, where a crew can tell.
        """

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a model's statistics to every worker; before that none is evaluated."""

    def use_scale(self, scale: Scale) -> None:
        """Give the scale of a fitness to every worker; before that none is evaluated."""

    def seconds_of_tasks(self) -> list[float]:
        """Return how long the first stage of each task takes."""

    def probe_tensors(self, subject: int) -> Mapping[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""

    def model_digest(self, subject: int) -> str:
        """Return a hash of a model's dense weights that are pruned."""

    def losses(
        self, requests: Sequence[LossRequest], done: Count = uncounted
    ) -> list[list[float] | None]:
        """Return each window's mean NLL in nats per token, for each request in order.

        Of the fitness text it is the objective. None where the criterion is degenerate on the
        model.
        """

    def zeros_and_overlap(
        self, requests: Sequence[MaskRequest], done: Count = uncounted
    ) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""

    @property
    def staff(self) -> Staff:
        """The workers now, and what went wrong so far."""
