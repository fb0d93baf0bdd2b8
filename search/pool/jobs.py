"""Jobs on their way to a result, and which of them is to blame when workers fail.

A job that came to a fault is given to another worker, before all that came after it. A candidate
with one try left is set aside until another call is answered: then workers are known to be of use,
and if it comes to that end once more, it is the cause. Where no other call can tell, a baseline is
evaluated; if that fails too, it is the pool that is of no use, and nothing is blamed.
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
"""How often a job may come to a fault of a kind; the last time is after a success elsewhere."""

MOST_SUSPECTS = 3
"""Candidates set aside, without any answer between, after which a baseline is evaluated."""

_WITNESS = Candidate(-1, BASELINES["wanda"].criterion)
"""What is evaluated to tell whether the workers are of any use."""


@dataclass(eq=False)
class Job:
    """A call that needs a result, from whichever worker.

    Attributes:
        number: Its place in the order in which jobs came.
        candidate: What is evaluated, if it is an evaluation.
        faults: How often it came to each kind of fault.
        result: What came of it at last: a value or a fault.
        done: Whether it is tried no more.
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
        """Whether it only tells if workers are of use."""
        return self.candidate is _WITNESS

    @property
    def can_fail(self) -> bool:
        """Whether the run goes on without its result."""
        return self.candidate is not None and not self.is_witness

    def reason(self, fault: Fault) -> str:
        """Return why it failed, the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        if fault.kind in ("lost", "crowded"):
            return f"ended every worker that it was given to, {times} of {times}: {fault.reason}"
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


class Jobs:
    """Jobs that wait, are being done, or are set aside.

    Args:
        tokens: What an evaluation costs; see `Call`.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._numbers = count()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._suspects: list[Job] = []
        self._witness: Job | None = None

    def evaluate(self, candidate: Candidate) -> None:
        """Let a candidate wait for its turn."""
        self._wait(Job(self._evaluation(candidate), next(self._numbers), candidate))

    def call(self, call: Call) -> Job:
        """Let a call that a run cannot do without wait for its turn."""
        job = Job(call, next(self._numbers))
        self._wait(job)
        return job

    def take(self) -> Job | None:
        """Return what is to be done next, in the order in which jobs came; None if nothing is."""
        if self._needs_witness():
            self._witness = job = Job(self._evaluation(_WITNESS), -1, _WITNESS)
        elif self._waiting:
            job = self._waiting.pop(0)
        else:
            return None
        self._running.add(job)
        return job

    def stumble(self, job: Job, fault: Fault) -> bool:
        """Count a fault that a job came to; return whether that was its last try."""
        self._running.discard(job)
        job.faults[fault.kind] += 1
        left = MOST[fault.kind] - job.faults[fault.kind]
        if left == 1 and job.can_fail:
            self._suspects.append(job)
        elif left > 0:
            self._wait(job)
        return left <= 0

    def answer(self, job: Job) -> None:
        """Note that a worker answered, whatever it said: those set aside have their last try."""
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
        alone = not self._waiting and not self._running
        return alone or len(self._suspects) >= MOST_SUSPECTS

    def _evaluation(self, candidate: Candidate) -> Call:
        return Call("evaluate", (candidate,), self._tokens)
