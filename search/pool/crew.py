"""Workers as a pool sees them: they are hired, given one call at a time, and can fail.

A crew knows where its workers live and nothing of candidates or tries; a pool knows nothing of
processes. What goes wrong comes back as a value, a `Fault`, from every crew alike.
"""

import resource
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

import search
from search.fitness import Evaluator
from search.pool.protocol import Timing

FaultKind = Literal["lost", "crowded", "exhausted", "late", "refused", "error"]
"""A worker's process ended; it was ended since its node lacked memory; it lacked memory itself, or
its device failed; it did not answer in time; a value was wrong; anything else went wrong."""

_DEVICE_FAULTS = ("CUDA error", "CUDA out of memory", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("DefaultCPUAllocator", "not enough memory", "out of memory")


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
        trace: The traceback, if there is one.
    """

    kind: FaultKind
    reason: str
    trace: str = ""


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
    """A worker is no more, or never began."""

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

    def wish(self, workers: int) -> None:
        """Tell a cluster that can grow how many workers are wanted in all."""


def perform(
    evaluator: Evaluator, method: str, arguments: Sequence[object]
) -> tuple[object, Timing]:
    """Do a call; return its result, or a `Fault`, and what is not reproducible beside it."""
    began = time.perf_counter()
    try:
        result = getattr(evaluator, method)(*arguments)
    except Exception as error:  # noqa: BLE001 - a worker's one place that turns all into a value
        result = fault_of(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    message = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {message[:200]}"
    if _lacks_resources(error, message):
        return Fault("exhausted", reason)
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ValueError):
        return Fault("refused", reason, trace)
    return Fault("error", f"{reason} at {_place(error)}", trace)


def _lacks_resources(error: Exception, message: str) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch reports a device's faults, and those of the CPU's allocator, as RuntimeError.
    words = (*_DEVICE_FAULTS, *_MEMORY_FAULTS)
    return isinstance(error, RuntimeError) and any(word in message for word in words)


def _place(error: Exception) -> str:
    """Return the innermost of our lines that an error passed, as `search/fitness.py:120`."""
    root = Path(search.__file__).parent.parent
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{path.relative_to(root).as_posix()}:{frame.lineno}"
        for frame in frames
        for path in [Path(frame.filename)]
        if path.is_relative_to(root) and "site-packages" not in path.parts
    ]
    return ours[-1] if ours else "a library"
