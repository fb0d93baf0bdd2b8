"""What a pool asks of its workers, what comes back, and the worker that is this process itself.

A request is a value that a worker carries out on its `Evaluator`, wherever the worker runs. What
goes wrong comes back as a value, too: a `Fault`, with a kind that means the same everywhere.
"""

import errno
import gc
import hashlib
import re
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from prunevolve.pruning.metric import Criterion
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment
from prunevolve.search.population import Candidate, Outcome
from prunevolve.search.scale import Scale

Result = TypeVar("Result", covariant=True)

Timing = Mapping[str, float]
"""What is not reproducible about a request: seconds, peak MiB, the worker's number."""

ROOT = Path(__file__).parents[2]  # prunevolve
PACKAGES = ("evaluation", "pruning", "search")
"""The packages below `ROOT` whose code an evaluation runs."""


class Request(Generic[Result]):
    """One unit of work for a worker; its type argument is the type of the result."""


@dataclass(frozen=True)
class Evaluate(Request[Outcome]):
    """Prune and measure a candidate."""

    candidate: Candidate


@dataclass(frozen=True)
class WindowLosses(Request[list[float] | None]):
    """Return each window's mean NLL in nats per token on a task's text; on fitness, the objective.

    Without a criterion, the dense model's; None if the criterion is degenerate on this model.
    """

    task: int
    role: str
    criterion: Criterion | None


@dataclass(frozen=True)
class CollectStatistics(Request[dict[str, Tensor]]):
    """Collect a model's statistics, by `X/layer`."""

    subject: int


@dataclass(frozen=True)
class ProbeTensors(Request[dict[str, Tensor]]):
    """Return the fingerprint's probe of a model; see `search.fingerprint`."""

    subject: int


@dataclass(frozen=True)
class UseStatistics(Request[None]):
    """Use a model's statistics from now on."""

    subject: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class UseScale(Request[None]):
    """Measure candidates on this scale from now on."""

    scale: Scale


def code_digest() -> str:
    """Return a hash of all source code that an evaluation runs."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# What comes back

FaultKind = Literal["lost", "crowded", "exhausted", "late", "refused", "error"]
"""A worker's process ended; it was killed because its node ran out of memory; it ran out of memory
itself, or its device failed; it did not answer in time; a value was wrong; any other error."""


@dataclass(frozen=True)
class Fault:
    """Why a request has no result.

    Attributes:
        reason: One line, the same wherever it happens.
        place: The line of our code where it happened, if the request itself failed.
        trace: The traceback, if there is one.
    """

    kind: FaultKind
    reason: str
    place: str = ""
    trace: str = ""

    @property
    def line(self) -> str:
        """The reason, and the place if it is known."""
        return f"{self.reason} at {self.place}" if self.place else self.reason


@dataclass(frozen=True)
class Started:
    """A worker holds its models and waits for requests.

    Attributes:
        digests: Hashes of each model's dense weights.
        seconds: Time taken to measure all fitness windows on the dense models.
    """

    worker: int
    digests: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Reply:
    """The result of a request, or a `Fault`; the worker waits for the next one."""

    worker: int
    result: object
    timing: Timing


@dataclass(frozen=True)
class Ended:
    """A worker ended or never started; if it had a request, it was `lost` or `crowded`."""

    worker: int
    fault: Fault


Event = Started | Reply | Ended


class Backend(Protocol):
    """Workers somewhere, each identified by a number that is never reused."""

    def hire(self, most: int) -> Sequence[int]:
        """Begin to start workers where there is room, at most so many; return their numbers."""

    def give(self, worker: int, request: Request[object]) -> None:
        """Give an idle worker a request."""

    def dismiss(self, worker: int) -> None:
        """End a worker at once, whatever it is doing; events that it still sends are ignored."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events since the last call, waiting at most this long for the first one."""

    def share(self, request: Request[None]) -> Request[None]:
        """Return a request that stands for this one when it is given to every worker."""


# What a worker does, wherever it runs


def attempt(action: Callable[[], Result]) -> Result | Fault:
    """Return what an action returns, or a fault if it raises any exception."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a worker turns all errors into values, here
        return fault_of(error)


def perform(evaluator: Evaluator, request: Request[object]) -> tuple[object, Timing]:
    """Do a request; return its result or a `Fault`, and its timing, which is not reproducible."""
    began = time.perf_counter()
    result = attempt(lambda: _result(evaluator, request))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}


def _result(evaluator: Evaluator, request: Request[object]) -> object:
    match request:
        case Evaluate(candidate):
            return evaluator.evaluate(candidate)
        case WindowLosses(task, role, criterion):
            return evaluator.losses(task, role, criterion)
        case CollectStatistics(subject):
            return evaluator.collect_statistics(subject)
        case ProbeTensors(subject):
            return evaluator.probe_tensors(subject)
        case UseStatistics(subject, tensors):
            evaluator.use_statistics(subject, tensors)
        case UseScale(scale):
            evaluator.use_scale(scale)
    return None


_DEVICE_FAULTS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("out of memory", "not enough memory", "DefaultCPUAllocator")


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    trace = "".join(traceback.format_exception(error))
    message = (str(error).strip().splitlines() or [""])[0][:200]
    # Drop what differs between attempts: sizes here, addresses below.
    if _lacks_memory(error, message):
        return Fault("exhausted", f"{type(error).__name__}: out of memory", "", trace)
    reason = f"{type(error).__name__}: {re.sub('0x[0-9a-f]+', '0x...', message)}"
    # torch reports device faults as RuntimeError.
    if isinstance(error, RuntimeError) and any(word in message for word in _DEVICE_FAULTS):
        return Fault("exhausted", reason, "", trace)
    kind: FaultKind = "refused" if isinstance(error, ValueError) else "error"
    return Fault(kind, reason, _place(error), trace)


def _lacks_memory(error: Exception, message: str) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator raises RuntimeError, too.
    return isinstance(error, RuntimeError) and any(word in message for word in _MEMORY_FAULTS)


def _place(error: Exception) -> str:
    """Return the innermost line of our code in the traceback, as `search/evaluator.py:120`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            return f"{path.relative_to(ROOT).as_posix()}:{frame.lineno}"
    return "a library"


class InProcessBackend:
    """The backend whose one worker is this process: for tests and for `ray.workers: 0`.

    It does its work inside `events`; after a dismissal, the models are loaded again.
    """

    def __init__(self, setup: Experiment) -> None:
        self._setup = setup
        self._worker = 0
        self._hired = False
        self._evaluator: Evaluator | None = None
        self._request: Request[object] | None = None

    def hire(self, most: int) -> Sequence[int]:
        """Begin to start the worker, if it is not there yet; `events` loads its models."""
        if self._hired or most < 1:
            return []
        self._worker += 1
        self._hired = True
        return [self._worker]

    def give(self, worker: int, request: Request[object]) -> None:
        """Keep a request for `events` to do."""
        self._request = request

    def dismiss(self, worker: int) -> None:
        """Release the models."""
        self._hired, self._evaluator, self._request = False, None, None
        gc.collect()  # before they are loaded again: memory may not hold two copies

    def events(self, seconds: float) -> Sequence[Event]:
        """Start the worker, or do the request that it has been given."""
        if self._hired and self._evaluator is None:
            return [self._start()]
        if self._request is None or self._evaluator is None:
            time.sleep(min(seconds, 0.05))
            return []
        request, self._request = self._request, None
        return [Reply(self._worker, *perform(self._evaluator, request))]

    def share(self, request: Request[None]) -> Request[None]:
        """Return the request itself."""
        return request

    def _start(self) -> Event:
        evaluator = attempt(lambda: Evaluator(self._setup))
        if isinstance(evaluator, Fault):
            self.dismiss(self._worker)
            return Ended(self._worker, evaluator)
        self._evaluator = evaluator
        return Started(self._worker, evaluator.digests, evaluator.seconds)
