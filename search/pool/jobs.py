"""The queue of a pool's jobs, and whom a fault is blamed on.

A job that met a worker's fault is given to another worker. Before a candidate's last try a baseline
is evaluated: if that works, the workers do, and the candidate is `failed` if it fails once more. A
candidate that raised an exception is `failed` as soon as another is evaluated; after several in a
row, or if there is nothing else to do, the baseline decides. If the baseline fails, or several
candidates in a row come to their last try, the pool itself is broken and no candidate is blamed.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from prunevolve.command_line import Resumable
from prunevolve.search.pool.worker import Call, Fault
from prunevolve.search.records import Candidate, Outcome, Timing

MOST = {"lost": 8, "no memory on node": 5, "out of memory": 3, "timeout": 3}
"""How often a job may meet a fault of a worker, by kind."""

MOST_SUSPECTS = 5
"""Candidates in a row, with none evaluated in between: so many at their last try end the run, and
so many exceptions have a baseline evaluated."""

_BASELINE = -1


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


@dataclass(eq=False)
class Job:
    """A call that needs a result, from any worker.

    Attributes:
        number: Its position in the order of arrival.
        candidate: The candidate that it evaluates; it may fail without ending the run.
        faults: How often it met each kind of fault.
        result: A value or a fault, final once it is done.
    """

    call: Call
    number: int
    candidate: Candidate | None = None
    faults: Counter[str] = field(default_factory=Counter)
    timing: Timing = field(default_factory=dict)
    result: object = None
    done: bool = False

    def reason(self, fault: Fault) -> str:
        """Return why it failed; the text is the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


class Jobs:
    """The jobs that wait, and the outcomes of those that are done.

    Args:
        baseline: What is done to see whether the workers work.

    Attributes:
        arrivals: Outcomes of candidates that nobody has taken yet.
        take: Called with each result of a job without a candidate, and with its call.
    """

    def __init__(self, baseline: Call) -> None:
        self._baseline = baseline
        self._numbers = count()
        self._waiting: list[Job] = []
        self._suspects: list[Job] = []
        self._raised: list[tuple[Job, Fault]] = []
        self._in_a_row = 0
        self._is_judged = False  # whether a baseline waits or is being evaluated
        self.arrivals: deque[Arrival] = deque()
        self.take: Callable[[Call, object], object] = lambda call, result: None

    def add(self, call: Call, candidate: Candidate | None = None) -> Job:
        """Add a job at the end of the queue."""
        job = Job(call, next(self._numbers), candidate)
        self._waiting.append(job)
        return job

    def next(self) -> Job | None:
        """Take the first job, if there is one."""
        if not self._waiting and self._raised:
            self._judge()
        return self._waiting.pop(0) if self._waiting else None

    def retry(self, job: Job, fault: Fault) -> None:
        """Take back a job whose worker had a fault, ahead of all later ones; fail it at its end.

        Raises:
            PoolError: If this shows that the pool is broken.
        """
        job.faults[fault.kind] += 1
        left = MOST[fault.kind] - job.faults[fault.kind]
        if left > 1 or (left == 1 and not job.candidate):
            self._again(job)
        elif left == 1:
            self._in_a_row += 1
            if self._in_a_row >= MOST_SUSPECTS:
                row = f"{MOST_SUSPECTS} candidates in a row, the last of them"
                raise PoolError(f"no worker functions: {row}: {job.reason(fault)}")
            self._judge()
            self._suspects.append(job)
        elif job.candidate:
            self._end(job, fault)
        else:
            raise PoolError(f"no worker functions: {job.reason(fault)}")

    def answer(self, job: Job, result: object) -> None:
        """Take a worker's answer to a job, a value or a fault of the job's own.

        Raises:
            ValueError: If a value was wrong in a job that the run cannot do without; one line.
            CallError: If anything else was wrong in such a job.
            PoolError: If a baseline cannot be evaluated.
        """
        if job.candidate and isinstance(result, Fault):
            self._raised.append((job, result))
            if len(self._raised) >= MOST_SUSPECTS:
                self._judge()
            return
        if job.number == _BASELINE:
            if isinstance(result, Fault):
                raise PoolError(f"no worker functions: a baseline fails, too: {result.line}")
            self._is_judged = False
            while self._suspects:
                self._again(self._suspects.pop())
        elif job.candidate:
            self._in_a_row = 0
        while self._raised:  # this worked, so they failed by themselves
            self._end(*self._raised.pop(0))
        if job.number != _BASELINE:
            self._end(job, result)

    def _judge(self) -> None:
        """Let a baseline be evaluated, unless one is: it shows who is to blame."""
        if not self._is_judged:
            self._is_judged = True
            self._again(Job(self._baseline, _BASELINE))

    def _again(self, job: Job) -> None:
        insort(self._waiting, job, key=lambda waiting: waiting.number)

    def _end(self, job: Job, result: object) -> None:
        job.result, job.done = result, True
        if job.candidate:
            outcome, trace = result, ""
            if isinstance(result, Fault):
                outcome, trace = Outcome("failed", reason=job.reason(result)), result.trace
            assert isinstance(outcome, Outcome)
            self.arrivals.append(Arrival(job.candidate.index, outcome, job.timing, trace))
        elif isinstance(result, Fault):
            failed = f"a worker failed in {job.call.method}"
            if result.kind == "refused":
                raise ValueError(f"{failed}: {result.reason}")
            raise CallError(f"{failed}: {job.reason(result)}", result.trace)
        else:
            self.take(job.call, result)
