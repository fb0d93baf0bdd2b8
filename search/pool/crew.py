"""Workers as a pool sees them: they are hired, given one call at a time, and can fail.

A crew knows where its workers live but nothing about candidates or retries; a pool knows nothing
about processes. Every crew reports failures as values: a `Fault`.
"""

import errno
import re
import resource
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

import search
from pruning.progress import Progress
from search.fitness import Evaluator
from search.pool.protocol import Timing

FaultKind = Literal["lost", "crowded", "exhausted", "late", "refused", "error"]
"""A worker's process ended; it was killed because its node ran out of memory; it ran out of memory
itself, or its device failed; it did not answer in time; a value was wrong; any other error."""

PACKAGES = ("evaluation", "pruning", "search")
"""The packages whose code an evaluation runs."""

_DEVICE_FAULTS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("out of memory", "not enough memory", "DefaultCPUAllocator")
_ADDRESS = re.compile(r"0x[0-9a-f]+")

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One unit of work for a worker.

    Attributes:
        method: A method of `Evaluator`.
        arguments: Plain values, and what `Crew.share` returned.
        tokens: Roughly how many tokens pass through a model; deadlines are computed from it.
    """

    method: str
    arguments: tuple[object, ...]
    tokens: int


@dataclass(frozen=True)
class Fault:
    """Why a call has no result.

    Attributes:
        reason: One line, the same wherever it happens.
        place: The line of our code where it happened, if the call itself failed.
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
    """A worker holds its models and waits for calls.

    Attributes:
        digests: Hashes of each model's dense weights.
        seconds: Time taken to measure all fitness windows on the dense models.
    """

    worker: int
    digests: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Reply:
    """The result of a call; the worker waits for the next one."""

    worker: int
    result: object
    timing: Timing


@dataclass(frozen=True)
class Ended:
    """A worker ended or never started; if it had a call, it was `lost` or `crowded`."""

    worker: int
    fault: Fault


Event = Started | Reply | Ended


class Crew(Protocol):
    """Workers somewhere, each identified by a number that is never reused."""

    def room(self) -> int:
        """Return how many more workers could start now."""

    def hire(self) -> int:
        """Begin starting a worker where there is room; return its number."""

    def give(self, worker: int, call: Call) -> None:
        """Give an idle worker a call."""

    def dismiss(self, worker: int) -> None:
        """End a worker at once, whatever it is doing; it sends no more events."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events since the last call, waiting at most this long for the first one."""

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Return an argument that stands for these tensors in calls to any worker."""

    def watch(self, progress: Progress) -> None:
        """Report the progress of collecting statistics from now on, where it is visible."""

    def wish(self, workers: int) -> None:
        """Tell a cluster that can grow how many workers are wanted in total."""


def attempt(action: Callable[[], T]) -> T | Fault:
    """Return what an action returns, or a fault if it raises any exception."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a worker turns all errors into values, here
        return fault_of(error)


def perform(
    evaluator: Evaluator, method: str, arguments: Sequence[object]
) -> tuple[object, Timing]:
    """Do a call; return its result or a `Fault`, and its timing, which is not reproducible."""
    began = time.perf_counter()
    result = attempt(lambda: getattr(evaluator, method)(*arguments))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    trace = "".join(traceback.format_exception(error))
    message = (str(error).strip().splitlines() or [""])[0][:200]
    # Drop what differs between attempts: sizes here, addresses below.
    if _lacks_memory(error, message):
        return Fault("exhausted", f"{type(error).__name__}: out of memory", "", trace)
    reason = f"{type(error).__name__}: {_ADDRESS.sub('0x...', message)}"
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
    """Return the innermost line of our code in the traceback, as `search/fitness.py:120`."""
    root = Path(search.__file__).parent.parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in PACKAGES:
            return f"{path.relative_to(root).as_posix()}:{frame.lineno}"
    return "a library"
