"""What a worker does, wherever it runs: jobs with an evaluator, and what goes wrong.

What goes wrong comes back as a value: a `Fault`, with a kind that means the same everywhere.
"""

import errno
import hashlib
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from prunevolve.search.evaluator import Evaluator
from prunevolve.search.fingerprint import tensors_digest
from prunevolve.search.records import Candidate, Outcome, Timing
from prunevolve.search.scale import Scale

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
    """Why a job has no result.

    Attributes:
        reason: One line, the same wherever it happens.
        place: The line of our code where it happened, if the job itself failed.
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


@dataclass(eq=False)
class Job:
    """A method of an `Evaluator` with its arguments, or one of the two by which a worker starts.

    Attributes:
        method: `place` asks a worker to be there, `load` to hold its models.
        cost: Roughly how long it takes, in times of all fitness windows on the dense models.
        number: Its position in the order of arrival; -1 of a baseline that judges the workers.
        faults: How often it met each kind of fault.
        result: What came of it, of a candidate its outcome; None before.
        trace: The traceback of a candidate that failed, if there is one.
    """

    method: str
    arguments: tuple[object, ...] = ()
    cost: float = 0.0
    number: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    timing: Timing = field(default_factory=dict)
    result: object = None
    trace: str = ""

    @property
    def is_candidate(self) -> bool:
        """Whether it evaluates a candidate of the search, which may fail without ending the run."""
        return self.method == "evaluate" and self.number >= 0

    @property
    def candidate(self) -> Candidate:
        """The candidate that it evaluates."""
        (candidate,) = self.arguments
        assert isinstance(candidate, Candidate)
        return candidate

    @property
    def outcome(self) -> Outcome:
        """The outcome of its candidate, once it is done."""
        assert isinstance(self.result, Outcome)
        return self.result

    def reason(self, fault: Fault) -> str:
        """Return why it failed; the text is the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


@dataclass(frozen=True)
class Loaded:
    """A worker holds its models.

    Attributes:
        digests: Hashes of each model's dense weights.
        seconds: Time taken to measure all fitness windows on the dense models.
    """

    digests: tuple[str, ...] = ()
    seconds: float = 0.0


Shared = Mapping[int | str, object]
"""What all workers use: each model's statistics by its index, and the `scale`. It goes with each
job, and a worker takes over what it does not have."""


class Worker:
    """An evaluator that does jobs.

    Args:
        build: Loads the evaluator.
        fetch: Returns the value for what stands in `Shared`.
    """

    def __init__(self, build: Callable[[], Evaluator], fetch: Callable[[object], object]) -> None:
        self._build, self._fetch = build, fetch
        self._evaluator: Evaluator | None = None
        self._has: dict[int | str, object] = {}

    def do(self, job: Job, shared: Shared) -> tuple[object, Timing]:
        """Return the result of a job, or a `Fault`; and its timing, which is not reproducible."""
        began = time.perf_counter()
        try:
            result = self._do(job, shared)
        except Exception as error:  # noqa: BLE001 - a worker turns all errors into values, here
            result = fault_of(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - began
        return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}

    def _do(self, job: Job, shared: Shared) -> object:
        if job.method == "place":
            return None
        if job.method == "load":
            self._evaluator = self._build()
        evaluator = self._evaluator
        assert evaluator
        for key, value in shared.items():
            if self._has.get(key) != value:
                if isinstance(key, int):
                    tensors = cast("dict[str, Tensor]", self._fetch(value))
                    evaluator.residents[key].use_statistics(tensors)
                else:
                    evaluator.scale = cast("Scale", self._fetch(value))
                self._has[key] = value
        if job.method == "load":
            digests = tuple(tensors_digest(resident.master) for resident in evaluator.residents)
            return Loaded(digests, sum(resident.seconds for resident in evaluator.residents))
        return getattr(evaluator, job.method)(*job.arguments)


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
