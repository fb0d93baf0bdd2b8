"""The workers of a pool: hiring them where there is room, preparing them, removing them.

A worker is fit once it holds its models and all statistics. Without a fit worker the pool waits; it
gives up when several workers in a row fail to start, or when none becomes fit for too long.
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
"""Workers that may fail to start in a row while there is no other worker."""

_LOOK_SECONDS = 2.0
"""Seconds between two checks for room for more workers."""

_LONGEST_LOOK = 60.0
"""The upper limit of this interval, which doubles with each worker that fails to start."""

_CROWDED_SECONDS = 3600.0
"""Seconds that a place stays empty after memory ran short twice within as many seconds."""

_LONGEST_STEP = 5.0
"""Seconds that one tick counts at most: nobody is late because this process was suspended."""


@dataclass(eq=False)
class Worker:
    """A worker that is starting, waiting or doing a call.

    Attributes:
        due: When it must have started, or finished its call.
        ready: Whether it holds its models.
        briefed: How many briefings it has received.
        heard: When it last answered.
        call: The call it is doing.
        job: The job that the call belongs to; None for a briefing or a ping.
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
        workers: The most to hire; None for as many as there is room for, now and later.
        wait_seconds: How long to go on without a fit worker.
        start_seconds: How long a worker may take to start.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.

    Attributes:
        now: Seconds since the start, without those in which this process was suspended.
        briefings: Calls that every worker must do before it gets a job.
        digests: Hashes of the models, the same in all workers; None until the first is ready.
        faults: Number of faults so far, by kind.
        trouble: The latest fault, in one line.
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
        self._say, self._last_message = say, ""
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
        """The current workers, and the faults so far."""
        fit = [worker for worker in self.workers.values() if self._is_fit(worker)]
        busy = sum(worker.job is not None for worker in fit)
        starting = len(self.workers) - len(fit)
        return Staff(len(fit), busy, starting, dict(self.faults), self.trouble)

    def tick(self) -> None:
        """Advance `now` by the time since the last tick."""
        time_now = self._clock()
        self.now += min(time_now - self._last, _LONGEST_STEP)
        self._last = time_now

    def hire(self) -> None:
        """Hire as many workers as are wanted and fit, if the next check is due."""
        alone_seconds = self.now - self._alone_since
        if self.now < self._next_look or self._is_refused or alone_seconds > self._wait_seconds:
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
            self._tell("no room for a worker now")
        least = 1 if room and not self.workers else 0
        for _ in range(int(max(least, min(wanted, room - spared)))):
            self.workers[self._crew.hire()] = Worker(self.now + self._start_seconds)

    def waiting(self) -> Iterator[tuple[int, Worker]]:
        """Yield the workers that hold their models and are idle."""
        for number, worker in self.workers.items():
            if worker.ready and not worker.call:
                yield number, worker

    def give(self, number: int, call: Call, seconds: float) -> None:
        """Give a worker a call, due in this many seconds."""
        worker = self.workers[number]
        worker.call, worker.due = call, self.now + seconds
        self._crew.give(number, call)

    def brief(self, number: int) -> None:
        """Give a worker its next briefing."""
        briefing = self.briefings[self.workers[number].briefed]
        self.give(number, briefing, self._start_seconds)

    def welcome(self, started: Started) -> None:
        """Admit a started worker, or dismiss it if its models differ from the others'."""
        if self.digests not in (None, started.digests):
            reason = f"its models are not the run's: {started.digests}, not {self.digests}"
            self.dismiss(started.worker, Fault("refused", reason))
            return
        self.digests = started.digests
        worker = self.workers[started.worker]
        worker.ready = True
        self.settle(worker)

    def settle(self, worker: Worker) -> None:
        """Forget failed starts if this worker is fit now."""
        if self._is_fit(worker):
            self._failed_starts.clear()

    def dismiss(self, number: int, fault: Fault) -> Worker:
        """End a worker; see `part`."""
        self._crew.dismiss(number)
        return self.part(number, fault)

    def part(self, number: int, fault: Fault) -> Worker:
        """Remove a worker that has ended, and return it."""
        worker = self.workers.pop(number)
        self.faults[fault.kind] += 1
        self.trouble = fault.line
        if fault.kind == "lost":
            for other in self.workers.values():
                other.heard = -math.inf  # the node that they share may be gone
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
        """Return the workers that should have started or answered by now, with a fault each."""
        faults = []
        for number, worker in self.workers.items():
            if (worker.call or not worker.ready) and self.now > worker.due:
                reason = "timeout: did not start in time"
                if worker.call:
                    reason = f"timeout: no answer to {worker.call.method} in time"
                faults.append((number, Fault("late", reason)))
        return faults

    def check(self) -> None:
        """Check that there are workers, or that some may still come.

        Raises:
            PoolError: If there are none, and the limits on waiting and on failed starts are hit.
        """
        if any(self._is_fit(worker) for worker in self.workers.values()):
            self._alone_since = self.now
        if self.workers:
            return  # starting workers have a deadline
        if self._is_refused:
            raise PoolError(f"no worker could be started: {self.trouble}")
        why = f"; the last fault: {self.trouble}" if self.trouble else ""
        failed = sum(kind not in ("lost", "crowded") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {failed} times{why}")
        if self.now - self._alone_since > self._wait_seconds:
            raise PoolError(f"no worker for {self._wait_seconds:g} s (ray.wait_seconds){why}")

    @property
    def _is_refused(self) -> bool:
        """Whether a worker rejected a value before any was ready: the next one would, too."""
        return self.digests is None and "refused" in self._failed_starts

    def _tell(self, message: str) -> None:
        """Show what happened, unless it repeats the last message."""
        if not self.workers:
            message += f"; waiting {self._wait_seconds:g} s for one (ray.wait_seconds)"
        if message != self._last_message:
            self._last_message = message
            self._say(message)

    def _is_fit(self, worker: Worker) -> bool:
        return worker.ready and worker.briefed == len(self.briefings)

    def _spare_a_place(self) -> None:
        """Hire one worker fewer for a while if memory also ran short recently."""
        if self.now - self._crowded < _CROWDED_SECONDS:
            self._spared.append(self.now + _CROWDED_SECONDS)
        self._crowded = self.now
