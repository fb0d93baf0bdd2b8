"""The workers of a pool: they are started, get calls, answer, and are stopped.

A worker that is lost, runs out of memory or does not answer in time is stopped, and its job goes to
another.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from prunevolve.configs.schema import Ray
from prunevolve.search.pool.jobs import MOST, Job, Jobs, PoolError
from prunevolve.search.pool.worker import LOAD, PLACE, Call, Fault, Loaded, Shared
from prunevolve.search.records import Timing

MOST_STARTS = 3
"""Workers that may fail to start in a row while there is no other worker."""

GRACE, FACTOR = 20.0, 10.0
"""A call is given GRACE seconds plus FACTOR times its expected duration."""

_LONGEST_BREAK = 60.0
"""The upper limit of the seconds before the next start, which double with each worker that fails to
start; also the seconds after a worker was killed because its node lacked memory."""

_LONGEST_TICK = 5.0
"""Seconds that one turn counts at most: no timeout because this process was suspended."""


class Backend(Protocol):
    """Workers somewhere, each identified by a number that is never reused."""

    def room(self) -> int:
        """Return how many workers there can be now."""

    def start(self) -> int:
        """Begin to start a worker; return its number."""

    def stop(self, worker: int) -> None:
        """End a worker at once, whatever it is doing; what it still sends is ignored."""

    def call(self, worker: int, call: Call, shared: Shared) -> None:
        """Give an idle worker a call."""

    def events(self, seconds: float) -> Sequence["Event"]:
        """Return what came since the last time, waiting at most this long for the first."""

    def share(self, value: object) -> object:
        """Return what stands for a value in `Shared`."""


@dataclass(frozen=True)
class Event:
    """A worker's result of a call, or a `Fault`."""

    worker: int
    result: object
    timing: Timing = field(default_factory=dict)


@dataclass(eq=False)
class _Worker:
    """A worker that waits for room, loads, waits for a call or does one.

    Attributes:
        call: What it does now.
        due: When that must be done; None until there is room for the worker.
        job: The job that its call belongs to; None while it starts.
        ready: Whether it holds its models.
    """

    call: Call | None = PLACE
    due: float | None = None
    job: Job | None = None
    ready: bool = False


class Workers:
    """The workers of a pool, and the faults so far.

    Args:
        backend: Where they live.
        jobs: What they do.
        settings: How many there are, and how long they are waited for.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.

    Attributes:
        shared: What all of them use.
        loaded: What the first that was ready said of its models.
        faults: Number of faults so far, by kind.
        trouble: The latest fault, in one line.
    """

    def __init__(
        self,
        backend: Backend,
        jobs: Jobs,
        settings: Ray,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._backend, self._jobs, self._settings = backend, jobs, settings
        self._clock, self._say = clock, say
        self._last_clock, self._now = clock(), 0.0
        self._workers: dict[int, _Worker] = {}
        self._failed_starts: list[str] = []
        self._next_start = self._alone_since = self._longest = 0.0
        self.shared: dict[tuple[str, *tuple[int, ...]], object] = {}
        self.loaded: Loaded | None = None
        self.faults: Counter[str] = Counter()
        self.trouble = ""

    @property
    def ready(self) -> int:
        """How many can evaluate."""
        return sum(worker.ready for worker in self._workers.values())

    @property
    def busy(self) -> int:
        """How many of those are working."""
        return sum(worker.job is not None for worker in self._workers.values())

    @property
    def starting(self) -> int:
        """How many wait for room or load models."""
        return len(self._workers) - self.ready

    def turn(self, seconds: float) -> None:
        """Let workers start, work, answer and stop, waiting at most this long for an answer.

        Raises:
            PoolError: If there is no worker and none comes, or no worker functions.
        """
        self._tick()
        self._start()
        self.assign()
        events = self._backend.events(seconds)
        self._tick()
        for event in events:
            if event.worker in self._workers:  # it may have been stopped meanwhile
                self._take(event, self._workers[event.worker])
        self.assign()  # before the driver turns to anything else
        for number, worker in list(self._workers.items()):
            if worker.call and worker.due is not None and self._now > worker.due:
                missed = "no answer" if worker.ready else "did not start"
                self._stop(number, Fault("timeout", f"timeout: {missed} in time"))
        self._check()

    def assign(self) -> None:
        """Give idle workers the jobs that wait."""
        for number, worker in self._workers.items():
            if not worker.call and (job := self._jobs.next()):
                worker.job, worker.call = job, job.call
                expected = max(self._longest, job.call.cost * (self.loaded or Loaded()).seconds)
                allowed = (GRACE + FACTOR * expected) * 2 ** job.faults["timeout"]
                worker.due = self._now + allowed
                self._backend.call(number, job.call, dict(self.shared))

    def _tick(self) -> None:
        clock = self._clock()
        self._now += min(clock - self._last_clock, _LONGEST_TICK)
        self._last_clock = clock

    def _start(self) -> None:
        """Start the workers that are wanted; those for whom there is no room yet wait."""
        most = self._settings.workers
        most = self._backend.room() if most is None else max(1, most)
        waiting = [number for number, worker in self._workers.items() if worker.due is None]
        for number in waiting[: max(0, len(self._workers) - most)]:  # a node is gone
            self._backend.stop(number)
            del self._workers[number]
        if self._now < self._next_start or self._is_refused:
            return
        for _ in range(most - len(self._workers)):
            number = self._backend.start()
            self._workers[number] = _Worker()
            self._backend.call(number, PLACE, {})

    def _check(self) -> None:
        """Raise PoolError if there are no workers, and none may still come."""
        if any(worker.ready for worker in self._workers.values()):
            self._alone_since = self._now
        if any(worker.due is not None for worker in self._workers.values()):
            return  # those that load have a deadline
        if self._is_refused:
            raise PoolError(f"no worker could be started: {self.trouble}")
        why = f"; the last fault: {self.trouble}" if self.trouble else ""
        if "memory" in self.trouble:
            why += ": set low_memory=true or fewer ray.workers"
        failed = sum(kind not in ("lost", "no memory on node") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {failed} times{why}")
        if self._now - self._alone_since > self._settings.wait_seconds:
            limit = f"{self._settings.wait_seconds:g} s (ray.wait_seconds)"
            raise PoolError(f"no worker for {limit}{why}")

    @property
    def _is_refused(self) -> bool:
        """Whether a worker rejected a value before any was ready: the next one would, too."""
        return self.loaded is None and "refused" in self._failed_starts

    def _take(self, event: Event, worker: _Worker) -> None:
        """Take a worker's answer."""
        call, job, result = worker.call, worker.job, event.result
        if isinstance(result, Fault) and (result.kind in MOST or not job):
            self._stop(event.worker, result)
            return
        worker.call = worker.job = None
        if isinstance(result, Loaded):
            self.loaded = self.loaded or result
            if result.digests != self.loaded.digests:
                reason = f"its models are not the run's: {result.digests}"
                self._stop(event.worker, Fault("refused", reason))
                return
            worker.ready = True
            self._failed_starts.clear()
        elif call == PLACE:
            worker.call, worker.due = LOAD, self._now + self._settings.start_seconds
            self._backend.call(event.worker, LOAD, dict(self.shared))
        elif job:
            job.timing = {**event.timing, "worker": event.worker}
            if isinstance(result, Fault):
                self.faults[result.kind] += 1
            elif job.candidate:
                self._longest = max(self._longest, event.timing.get("seconds", 0.0))
            self._jobs.answer(job, result)

    def _stop(self, number: int, fault: Fault) -> None:
        """Stop a worker, or forget one that has ended; its job, if it had one, met the fault."""
        self._backend.stop(number)
        worker = self._workers.pop(number)
        self.faults[fault.kind] += 1
        lacks_memory = fault.kind == "no memory on node" and self._workers
        pause = _LONGEST_BREAK if lacks_memory else 0.0
        if worker.ready:
            self._failed_starts.clear()
        else:
            self._failed_starts.append(fault.kind)
            pause = min(_LONGEST_BREAK, 2.0 ** len(self._failed_starts))
        self._next_start = max(self._next_start, self._now + pause)
        if fault.line != self.trouble:  # news
            self._say(f"a worker ended: {fault.line}")
        self.trouble = fault.line
        if worker.job:
            self._jobs.retry(worker.job, fault)
