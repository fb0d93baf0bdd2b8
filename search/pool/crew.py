"""Workers as a pool sees them: they are hired, given one call at a time, and can fail.

A crew knows where its workers live and nothing of candidates or tries; a pool knows nothing of
processes. What goes wrong comes back as a value, a `Fault`, from every crew alike.
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
"""A worker's process ended; it was ended since its node lacked memory; it lacked memory itself, or
its device failed; it did not answer in time; a value was wrong; anything else went wrong."""

PACKAGES = ("evaluation", "pruning", "search")
"""Those whose code an evaluation runs."""

_DEVICE_FAULTS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("out of memory", "not enough memory", "DefaultCPUAllocator")
_ADDRESS = re.compile(r"0x[0-9a-f]+")

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One thing to do.

    Attributes:
        method: A method of `Evaluator`.
        arguments: Plain values, and what `Crew.share` returned.
        tokens: Tokens that pass a model, roughly: what a deadline is made of.
    """

    method: str
    arguments: tuple[object, ...]
    tokens: int


@dataclass(frozen=True)
class Fault:
    """Why a call has no result.

    Attributes:
        reason: One line, the same wherever it happens.
        place: The line of ours where it happened, if it is a fault of the call.
        trace: The traceback, if there is one.
    """

    kind: FaultKind
    reason: str
    place: str = ""
    trace: str = ""

    @property
    def line(self) -> str:
        """The reason, and where that is known the place."""
        return f"{self.reason} at {self.place}" if self.place else self.reason


@dataclass(frozen=True)
class Started:
    """A worker holds its models and waits for calls.

    Attributes:
        digests: Of each model's dense weights.
        seconds: It took to measure all fitness windows on the dense models.
    """

    worker: int
    digests: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Reply:
    """What a call came to; the worker waits for the next."""

    worker: int
    result: object
    timing: Timing


@dataclass(frozen=True)
class Ended:
    """A worker is no more, or never began; one that had a call was `lost` or `crowded`."""

    worker: int
    fault: Fault


Event = Started | Reply | Ended


class Crew(Protocol):
    """Workers somewhere, each known by a number that is used once."""

    def room(self) -> int:
        """Return how many more workers there is a place for now."""

    def hire(self) -> int:
        """Begin to start a worker where there is a place; return its number."""

    def give(self, worker: int, call: Call) -> None:
        """Let a waiting worker do a call."""

    def dismiss(self, worker: int) -> None:
        """End a worker at once, whatever it does; no more is heard of it."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what happened, waiting at most so long for the first of it."""

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Return an argument that means these tensors in a call, for every worker."""

    def watch(self, progress: Progress) -> None:
        """Tell from now on how far the collection of statistics is, where that can be seen."""

    def wish(self, workers: int) -> None:
        """Tell a cluster that can grow how many workers are wanted in all."""


def attempt(action: Callable[[], T]) -> T | Fault:
    """Return what an action returns, or a fault in place of any exception."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - a worker's one place that turns all into a value
        return fault_of(error)


def perform(
    evaluator: Evaluator, method: str, arguments: Sequence[object]
) -> tuple[object, Timing]:
    """Do a call; return its result, or a `Fault`, and what is not reproducible beside it."""
    began = time.perf_counter()
    result = attempt(lambda: getattr(evaluator, method)(*arguments))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    trace = "".join(traceback.format_exception(error))
    message = (str(error).strip().splitlines() or [""])[0][:200]
    # Sizes, addresses and the like differ from try to try.
    if _lacks_memory(error, message):
        return Fault("exhausted", f"{type(error).__name__}: out of memory", "", trace)
    reason = f"{type(error).__name__}: {_ADDRESS.sub('0x...', message)}"
    # torch reports a device's faults as RuntimeError.
    if isinstance(error, RuntimeError) and any(word in message for word in _DEVICE_FAULTS):
        return Fault("exhausted", reason, "", trace)
    kind: FaultKind = "refused" if isinstance(error, ValueError) else "error"
    return Fault(kind, reason, _place(error), trace)


def _lacks_memory(error: Exception, message: str) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # What torch's allocator for the CPU says is a RuntimeError, too.
    return isinstance(error, RuntimeError) and any(word in message for word in _MEMORY_FAULTS)


def _place(error: Exception) -> str:
    """Return the innermost of our lines that an error passed, as `search/fitness.py:120`."""
    root = Path(search.__file__).parent.parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(root) and path.relative_to(root).parts[0] in PACKAGES:
            return f"{path.relative_to(root).as_posix()}:{frame.lineno}"
    return "a library"
