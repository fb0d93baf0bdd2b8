"""The workers of a pool: hired where there is room, known to be fit, missed when they are gone.

A worker is fit once it holds its models and all statistics. While there is none the pool waits; it
gives up when workers fail to start one after the other, or when none comes for too long.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from search.pool.crew import Call, Crew, Fault, FaultKind, Started
from search.pool.jobs import Job
from search.pool.protocol import PoolError, Staff

MOST_STARTS = 3
"""Workers that may fail to start one after the other while there is none."""

_LOOK_SECONDS = 2.0
"""Between two looks for room for more workers."""

_LONGEST_LOOK = 60.0
"""The same, after worker upon worker failed to start."""

_CROWDED_SECONDS = 3600.0
"""How long a place stays free where memory ran short twice within such a time."""

_LONGEST_STEP = 5.0
"""What a step counts at most: while this process is stopped, nobody is late."""


@dataclass(eq=False)
class Worker:
    """A worker that starts, waits or does a call.

    Attributes:
        due: When it should have started, or its call should be done.
        ready: Whether it holds its models.
        briefed: How many models' statistics it has.
        heard: When it last answered.
        call: What it does.
        job: Whose call that is; None if it is for the worker's own sake.
    """

    due: float
    ready: bool = False
    briefed: int = 0
    heard: float = -math.inf
    call: Call | None = None
    job: Job | None = None


class Roster:
    """The workers that a crew has now, by number.

    Args:
        crew: Where they live.
        workers: How many at most; None for all that there is room for, now and later.
        wait_seconds: How long to go on without a fit one.
        start_seconds: How long one may take to start.
        clock: Seconds, from whenever.
        say: Takes a line for the person who waits.

    Attributes:
        now: Seconds that this process was not stopped.
        briefings: What every worker is told before it gets a job.
        digests: Of the models that all of them have; None until the first is ready.
        faults: What went wrong so far, by kind.
        trouble: The last of it.
    """

    def __init__(
        self,
        crew: Crew,
        workers: int | None,
        wait_seconds: float,
        start_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._crew, self._most = crew, workers
        self._say, self._told = say, ""
        self._wait_seconds, self._start_seconds = wait_seconds, start_seconds
        self._clock, self._last = clock, clock()
        self.now = 0.0
        self.workers: dict[int, Worker] = {}
        self.briefings: list[Call] = []
        self.digests: tuple[str, ...] | None = None
        self.faults: Counter[str] = Counter()
        self.trouble = ""
        self._failed_starts: list[FaultKind] = []
        self._spared: list[float] = []
        self._crowded = -math.inf
        self._next_look = self._alone_since = 0.0

    @property
    def staff(self) -> Staff:
        """The workers now, and what went wrong so far."""
        fit = [worker for worker in self.workers.values() if self._is_fit(worker)]
        busy = sum(worker.job is not None for worker in fit)
        starting = len(self.workers) - len(fit)
        return Staff(len(fit), busy, starting, dict(self.faults), self.trouble)

    def tick(self) -> None:
        """Look at the clock."""
        clock = self._clock()
        self.now += min(clock - self._last, _LONGEST_STEP)
        self._last = clock

    def hire(self) -> None:
        """Fill the places that there are, now and then."""
        alone = self.now - self._alone_since
        if self.now < self._next_look or self._is_refused or alone > self._wait_seconds:
            return
        self._next_look = self.now + _LOOK_SECONDS
        spared = sum(until > self.now for until in self._spared)
        wanted = math.inf
        if self._most is not None:
            wanted = self._most - spared - len(self.workers)
            if wanted <= 0:
                return
            self._crew.wish(self._most - spared)
        room = self._crew.room()
        if not room and not self.workers:
            self._tell("no place for a worker now")
        least = 1 if room and not self.workers else 0
        for _ in range(int(max(least, min(wanted, room - spared)))):
            self.workers[self._crew.hire()] = Worker(self.now + self._start_seconds)

    def waiting(self) -> Iterator[tuple[int, Worker]]:
        """Yield those that hold their models and do nothing."""
        for number, worker in self.workers.items():
            if worker.ready and not worker.call:
                yield number, worker

    def give(self, number: int, call: Call, seconds: float) -> None:
        """Let a worker do a call within so many seconds."""
        worker = self.workers[number]
        worker.call, worker.due = call, self.now + seconds
        self._crew.give(number, call)

    def brief(self, number: int) -> None:
        """Tell a worker the next of what it must know."""
        briefing = self.briefings[self.workers[number].briefed]
        self.give(number, briefing, self._start_seconds)

    def welcome(self, started: Started) -> None:
        """Let a worker join that has the models of the others."""
        if self.digests not in (None, started.digests):
            reason = f"its models are not the run's: {started.digests}, not {self.digests}"
            self.dismiss(started.worker, Fault("refused", reason))
            return
        self.digests = started.digests
        worker = self.workers[started.worker]
        worker.ready = True
        self.settle(worker)

    def settle(self, worker: Worker) -> None:
        """Forget about failed starts if a worker is fit now."""
        if self._is_fit(worker):
            self._failed_starts.clear()

    def dismiss(self, number: int, fault: Fault) -> Worker:
        """End a worker; see `part`."""
        self._crew.dismiss(number)
        return self.part(number, fault)

    def part(self, number: int, fault: Fault) -> Worker:
        """Do without a worker that is no more, and return it."""
        worker = self.workers.pop(number)
        self.faults[fault.kind] += 1
        self.trouble = fault.line
        if fault.kind == "lost":
            for other in self.workers.values():
                other.heard = -math.inf  # it may have been their node
        if fault.kind == "crowded":
            self._spare_a_place()
        if self._is_fit(worker):
            self._failed_starts.clear()
            self._next_look = self.now
        else:
            self._failed_starts.append(fault.kind)
            self._next_look = self.now + min(_LONGEST_LOOK, 2.0 ** len(self._failed_starts))
        if not self._is_refused:
            self._tell(f"a worker ended: {fault.line}")
        return worker

    def late(self) -> list[tuple[int, Fault]]:
        """Return those that should have started or answered by now."""
        found = []
        for number, worker in self.workers.items():
            if (worker.call or not worker.ready) and self.now > worker.due:
                doing = worker.call.method if worker.call else "its start"
                found.append((number, Fault("late", f"timeout: no answer to {doing} in time")))
        return found

    def check(self) -> None:
        """See that there are workers, or that some are to be expected.

        Raises:
            PoolError: If that is not so.
        """
        if any(self._is_fit(worker) for worker in self.workers.values()):
            self._alone_since = self.now
        if self.workers:
            return  # those that start have a time by which they must
        if self._is_refused:
            raise PoolError(f"no worker could be started: {self.trouble}")
        why = f"; the last trouble: {self.trouble}" if self.trouble else ""
        failed = sum(kind not in ("lost", "crowded") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {failed} times{why}")
        if self.now - self._alone_since > self._wait_seconds:
            raise PoolError(f"no worker for {self._wait_seconds:g} s (ray.wait_seconds){why}")

    @property
    def _is_refused(self) -> bool:
        """Whether a worker found a value wrong before any was ready: the next would, too."""
        return self.digests is None and "refused" in self._failed_starts

    def _tell(self, what: str) -> None:
        """Say what happened, once if it happens again and again."""
        if not self.workers:
            what += f"; waiting {self._wait_seconds:g} s for one (ray.wait_seconds)"
        if what != self._told:
            self._told = what
            self._say(what)

    def _is_fit(self, worker: Worker) -> bool:
        return worker.ready and worker.briefed == len(self.briefings)

    def _spare_a_place(self) -> None:
        """Have one worker less for a while if memory ran short before."""
        if self.now - self._crowded < _CROWDED_SECONDS:
            self._spared.append(self.now + _CROWDED_SECONDS)
        self._crowded = self.now
