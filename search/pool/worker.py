"""What a worker does, wherever it runs: calls of an evaluator's methods, and what goes wrong.

What goes wrong comes back as a value: a `Fault`, with a kind that means the same everywhere.
"""

import errno
import hashlib
import re
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from prunevolve.search.evaluator import Evaluator
from prunevolve.search.records import Timing

Result = TypeVar("Result")

ROOT = Path(__file__).parents[2]  # prunevolve
PACKAGES = ("configs", "evaluation", "pruning", "search")
"""The packages below `ROOT` whose code an evaluation runs, but for the report."""


def code_digest() -> str:
    """Return a hash of all source code that an evaluation runs."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path in (ROOT / "search/report.py", ROOT / "search/charts.py"):
                continue
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


FaultKind = Literal["lost", "no memory on node", "out of memory", "timeout", "refused", "error"]
"""A worker's process ended; its node ran out of memory and killed it; it ran out of memory itself,
or its device failed; it did not answer in time; a value was wrong; any other error."""


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
class Call:
    """A method of an `Evaluator` and its arguments, or one of the two by which a worker starts.

    Attributes:
        cost: Roughly how long it takes, in times of all fitness windows on the dense models.
    """

    method: str
    arguments: tuple[object, ...] = ()
    cost: float = 0.0


PLACE, LOAD = Call("place"), Call("load")
"""What a worker is asked first: to be there, and to load its models."""


@dataclass(frozen=True)
class Loaded:
    """A worker holds its models.

    Attributes:
        digests: Hashes of each model's dense weights.
        seconds: Time taken to measure all fitness windows on the dense models.
    """

    digests: tuple[str, ...] = ()
    seconds: float = 0.0


Shared = Mapping[tuple[str, *tuple[int, ...]], object]
"""What all workers use, by the method that takes it and its other arguments: each model's
statistics, and the scale. It goes with each call, and a worker takes over what it does not have."""


class Desk:
    """An evaluator that does calls.

    Args:
        build: Loads the evaluator.
        fetch: Returns the value for what stands in `Shared`.
    """

    def __init__(self, build: Callable[[], Evaluator], fetch: Callable[[object], object]) -> None:
        self._build, self._fetch = build, fetch
        self._evaluator: Evaluator | None = None
        self._has: dict[tuple[str, *tuple[int, ...]], object] = {}

    def do(self, call: Call, shared: Shared) -> tuple[object, Timing]:
        """Return the result of a call, or a `Fault`; and its timing, which is not reproducible."""
        began = time.perf_counter()
        try:
            result = self._do(call, shared)
        except Exception as error:  # noqa: BLE001 - a worker turns all errors into values, here
            result = fault_of(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - began
        return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}

    def _do(self, call: Call, shared: Shared) -> object:
        if call == PLACE:
            return None
        evaluator = self._evaluator = self._build() if call == LOAD else self._evaluator
        for key, value in shared.items():
            if self._has.get(key) != value:
                method, *arguments = key
                getattr(evaluator, method)(*arguments, self._fetch(value))
                self._has[key] = value
        if evaluator and call == LOAD:
            return Loaded(evaluator.digests, evaluator.seconds)
        return getattr(evaluator, call.method)(*call.arguments)


_DEVICE_FAULTS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("out of memory", "not enough memory", "DefaultCPUAllocator")


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    trace = "".join(traceback.format_exception(error))
    message = (str(error).strip().splitlines() or [""])[0][:200]
    # Drop what differs between attempts: sizes here, addresses below.
    if _lacks_memory(error, message):
        return Fault("out of memory", f"{type(error).__name__}: out of memory", "", trace)
    reason = f"{type(error).__name__}: {re.sub('0x[0-9a-f]+', '0x...', message)}"
    # torch reports device faults as RuntimeError.
    if isinstance(error, RuntimeError) and any(word in message for word in _DEVICE_FAULTS):
        return Fault("out of memory", reason, "", trace)
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
