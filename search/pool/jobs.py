"""Pending jobs, and which of them is to blame when workers fail.

A job that met a fault is given to another worker, ahead of all later jobs. A candidate with one
try left is set aside until another call is answered: then the workers are known to work, and if
the candidate fails the same way again, it is the cause. If no other call can settle this, a
baseline is evaluated; if that fails too, the pool itself is broken and no candidate is blamed.
"""

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from pruning.baselines import BASELINES
from search.pool.crew import Call, Fault
from search.pool.protocol import Timing
from search.population import Candidate

MOST = {"lost": 8, "crowded": 5, "exhausted": 3, "late": 3}
"""How often a job may meet a fault of each kind; its last try follows a success elsewhere."""

MOST_SUSPECTS = 3
"""Candidates set aside, with no answer in between, before a baseline is evaluated."""

_WITNESS = Candidate(-1, BASELINES["wanda"].criterion)
"""The baseline that is evaluated to tell whether the workers function."""


@dataclass(eq=False)
class Job:
    """A call that needs a result, from any worker.

    Attributes:
        number: Its position in the order of arrival.
        candidate: The candidate to evaluate, if this is an evaluation.
        faults: How often it met each kind of fault.
        result: The final result: a value or a fault.
        done: Whether the result is final.
    """

    call: Call
    number: int
    candidate: Candidate | None = None
    faults: Counter[str] = field(default_factory=Counter)
    result: object = None
    timing: Timing = field(default_factory=dict)
    done: bool = False

    @property
    def is_witness(self) -> bool:
        """Whether it only tests that workers function."""
        return self.candidate is _WITNESS

    @property
    def can_fail(self) -> bool:
        """Whether the run can go on without its result."""
        return self.candidate is not None and not self.is_witness

    def reason(self, fault: Fault) -> str:
        """Return why it failed; the text is the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        if fault.kind in ("lost", "crowded"):
            return f"ended every worker that it was given to, {times} of {times}: {fault.reason}"
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


class Jobs:
    """Jobs that are waiting, running, or set aside.

    Args:
        tokens: The cost of one evaluation; see `Call`.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._numbers = count()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._suspects: list[Job] = []
        self._witness: Job | None = None

    def evaluate(self, candidate: Candidate) -> None:
        """Queue the evaluation of a candidate."""
        self._wait(Job(self._evaluation(candidate), next(self._numbers), candidate))

    def call(self, call: Call) -> Job:
        """Queue a call that the run cannot do without."""
        job = Job(call, next(self._numbers))
        self._wait(job)
        return job

    def take(self) -> Job | None:
        """Return the next job in order of arrival, or None if there is none."""
        if self._needs_witness():
            self._witness = job = Job(self._evaluation(_WITNESS), -1, _WITNESS)
        elif self._waiting:
            job = self._waiting.pop(0)
        else:
            return None
        self._running.add(job)
        return job

    def stumble(self, job: Job, fault: Fault) -> bool:
        """Count a fault against a job; return whether that was its last try."""
        self._running.discard(job)
        job.faults[fault.kind] += 1
        left = MOST[fault.kind] - job.faults[fault.kind]
        if left == 1 and job.can_fail:
            self._suspects.append(job)
        elif left > 0:
            self._wait(job)
        return left <= 0

    def answer(self, job: Job) -> None:
        """Note that a worker answered, whatever the result: jobs set aside get their last try."""
        self._running.discard(job)
        if job.is_witness:
            self._witness = None
        for suspect in self._suspects:
            self._wait(suspect)
        self._suspects = []

    def _wait(self, job: Job) -> None:
        insort(self._waiting, job, key=lambda waiting: waiting.number)

    def _needs_witness(self) -> bool:
        if self._witness or not self._suspects:
            return False
        no_others = not self._waiting and not self._running
        return no_others or len(self._suspects) >= MOST_SUSPECTS

    def _evaluation(self, candidate: Candidate) -> Call:
        return Call("evaluate", (candidate,), self._tokens)
