"""What a worker does, wherever it runs: jobs with an evaluator, and what goes wrong.

What goes wrong comes back as a value: a `Fault`, with a kind that means the same everywhere.
"""

import errno
import gc
import hashlib
import math
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, cast

from torch import Tensor

from prunevolve.search.descent import Step
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment
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
            if path == ROOT / "search/report.py":
                continue
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


FaultKind = Literal["lost", "no memory on node", "out of memory", "timeout", "refused", "error"]
"""A worker's process ended; its node ran out of memory and killed it; it ran out of memory itself,
or its device failed; it did not answer in time; a value was wrong; any other error."""


@dataclass(frozen=True)
class Fault:
    """Why a job has no result."""

    kind: FaultKind
    reason: str  # one line, the same wherever it happens
    source: str = ""  # the line of our code where it happened, if the job itself failed
    trace: str = ""  # the traceback, if there is one

    @property
    def line(self) -> str:
        """The reason, and its source if there is one."""
        return f"{self.reason} at {self.source}" if self.source else self.reason


@dataclass(eq=False)
class Job:
    """A method of an `Evaluator` with its arguments, or one of the two by which a worker starts.

    `arrive` asks a worker to be there, `load` to hold its models.
    """

    method: str
    arguments: tuple[object, ...] = ()
    cost: float = 0.0  # roughly, in times of all fitness windows on the dense models
    number: int = 0  # position in the order of arrival; -1 of a baseline that judges the workers
    faults: Counter[str] = field(default_factory=Counter)  # how often it met each kind
    due: float = math.inf  # when its worker must be done with it, or with the step that it makes
    timing: Timing = field(default_factory=dict)  # the worker's number, and what it took so far
    step: Step | None = None  # how far the descent is that it makes
    result: object = None  # of a candidate its outcome; None before
    trace: str = ""  # the traceback of a candidate that failed

    @property
    def is_start(self) -> bool:
        """Whether a worker starts by it."""
        return self.method in ("arrive", "load")

    @property
    def is_candidate(self) -> bool:
        """Whether it evaluates a candidate of the search, which may fail without ending the run."""
        return self.method == "evaluating" and self.number >= 0

    @property
    def candidate(self) -> Candidate:
        """The candidate that it evaluates."""
        return cast("Candidate", self.arguments[0])

    @property
    def outcome(self) -> Outcome:
        """The outcome of its candidate, once it is done."""
        return cast("Outcome", self.result)

    def reason(self, fault: Fault) -> str:
        """Return why it failed; the text is the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


@dataclass(frozen=True)
class Loaded:
    """A worker holds its models."""

    digests: tuple[str, ...] = ()  # hashes of each model's dense weights
    seconds: float = 0.0  # to measure all fitness windows on the dense models


Shared = Mapping[int | str, Callable[[], object]]
"""What returns what all workers use: each model's statistics, by its index, and the `scale`. It
goes with each job, and a worker takes over what it does not have."""

Event: TypeAlias = tuple[int, object, Timing]
"""A worker's number, the result of its job, a `Fault` or the latest `Step`, and the timing."""


@dataclass(eq=False)
class Worker:
    """What a worker's process holds, on Ray as an actor: an evaluator that does jobs."""

    build: Callable[[], Evaluator]

    def __post_init__(self) -> None:
        self._evaluator: Evaluator | None = None
        self._has: set[int | str] = set()
        self._steps: Generator[Step, None, object] | None = None  # of the job that it does

    def do(self, job: Job, shared: Shared) -> tuple[object, Timing]:
        """Return the result of a job, or a `Fault`; and its timing, which is not reproducible.

        A job in steps returns after each, and goes on when it is given again.
        """
        began = time.perf_counter()
        try:
            result = self._do(job, shared)
        except Exception as error:  # noqa: BLE001 - a worker turns all errors into values, here
            self._steps, result = None, fault_of(error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - began
        return result, {"seconds": round(seconds, 4), "peak_mib": round(peak, 1)}

    def _do(self, job: Job, shared: Shared) -> object:
        if job.method == "arrive":
            return None
        if job.method == "load":
            self._evaluator = self.build()
        evaluator = self._evaluator
        assert evaluator
        for key in shared.keys() - self._has:
            value = shared[key]()
            if isinstance(key, int):
                evaluator.residents[key].use_statistics(cast("dict[str, Tensor]", value))
            else:
                evaluator.scale = cast("Scale", value)
            self._has.add(key)
        if job.method == "load":
            digests = tuple(tensors_digest(resident.master) for resident in evaluator.residents)
            return Loaded(digests, sum(resident.seconds for resident in evaluator.residents))
        if not self._steps:
            result = getattr(evaluator, job.method)(*job.arguments)
            if not isinstance(result, Generator):
                return result
            self._steps = result
        try:
            return next(self._steps)
        except StopIteration as end:
            self._steps = None
            return end.value


class InProcess:
    """The backend whose one worker is this process: for tests and for `ray.workers: 0`.

    A job is done inside `events`; once the worker is stopped, the next loads anew.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._build = partial(Evaluator, experiment)
        self._worker: Worker | None = None
        self._given: tuple[Job, Shared] | None = None

    def room(self) -> int:
        return 1

    def start(self, worker: int) -> None:
        self._number, self._worker = worker, Worker(self._build)

    def stop(self, worker: int) -> None:
        self._worker = self._given = None
        gc.collect()  # before they are loaded again: memory may not hold two copies

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        self._given = job, shared

    def events(self, seconds: float) -> Sequence[Event]:
        if not self._given or not self._worker:
            time.sleep(min(seconds, 0.05))
            return []
        given, self._given = self._given, None
        return [(self._number, *self._worker.do(*given))]

    def share(self, value: object) -> Callable[[], object]:
        return lambda: value


_DEVICE_FAULTS = ("CUDA error", "cuBLAS", "CUBLAS", "cuDNN", "CUDNN", "NCCL")
_MEMORY_FAULTS = ("out of memory", "not enough memory", "DefaultCPUAllocator")


def fault_of(error: Exception) -> Fault:
    """Return what an exception means for a pool."""
    name, trace = type(error).__name__, "".join(traceback.format_exception(error))
    message = (str(error).strip().splitlines() or [""])[0][:200]
    # As torch reports faults of its CPU allocator and of devices.
    of_torch = message if isinstance(error, RuntimeError) else ""
    # What differs between attempts is dropped: sizes here, addresses below.
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(word in of_torch for word in _MEMORY_FAULTS)
    ):
        return Fault("out of memory", f"{name}: out of memory", trace=trace)
    reason = f"{name}: {re.sub('0x[0-9a-f]+', '0x...', message)}"
    if any(word in of_torch for word in _DEVICE_FAULTS):
        return Fault("out of memory", reason, trace=trace)
    kind: FaultKind = "refused" if isinstance(error, ValueError) else "error"
    return Fault(kind, reason, _source(error), trace)


def _source(error: Exception) -> str:
    """Return the innermost line of our code in the traceback, as `search/evaluator.py:120`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            return f"{path.relative_to(ROOT).as_posix()}:{frame.lineno}"
    return "a library"
