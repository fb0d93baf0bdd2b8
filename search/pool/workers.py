"""The workers as the driver sees them: they are started, get jobs, answer, and are stopped.

A worker that is lost, runs out of memory or does not answer in time is stopped, and its job goes to
another.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prunevolve.command_line import Resumable
from prunevolve.configs.schema import Ray
from prunevolve.search.descent import Step
from prunevolve.search.pool.worker import Event, Fault, Job, Loaded, Shared
from prunevolve.search.records import Timing

# How often a job may meet a fault of a worker, by kind.
MAX_TRIES = {"lost": 8, "no memory on node": 5, "out of memory": 3, "timeout": 3}
MOST_STARTS = 3  # workers that may fail to start in a row while there is no other worker
GRACE, FACTOR = 20.0, 10.0  # a job is given GRACE seconds plus FACTOR times its expected duration
# Most seconds before the next start, which double with each worker that fails to start; also the
# seconds after a worker was killed because its node lacked memory.
_LONGEST_BREAK = 60.0
_LONGEST_TICK = 5.0  # most seconds that one turn counts: this process may have been suspended


class Backend(Protocol):
    """Workers somewhere, by numbers that are never reused."""

    def room(self) -> int:
        """Return how many workers there can be now."""

    def start(self, worker: int) -> None:
        """Begin to start a worker."""

    def stop(self, worker: int) -> None:
        """End a worker at once, whatever it is doing; what it still sends is ignored."""

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        """Give an idle worker a job."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what came since the last time, waiting at most this long for the first."""

    def share(self, value: object) -> Callable[[], object]:
        """Return what returns a value to a worker."""


@dataclass(eq=False)
class Workers:
    """All workers with what each does, and the faults so far."""

    backend: Backend
    next_job: Callable[[], Job | None]  # returns the next job that waits, if there is one
    settings: Ray
    clock: Callable[[], float]  # returns seconds since any fixed time
    say: Callable[[str], object]  # shows a line to the user

    def __post_init__(self) -> None:
        self._last_clock, self._now = self.clock(), 0.0
        # What each worker does, by its number: it waits for room, loads, is idle or has a job.
        self._doing: dict[int, Job | None] = {}
        self._started = 0
        self._failed_starts: list[str] = []
        self._next_start = self._alone_since = self._longest = 0.0
        self.shared: dict[int | str, Callable[[], object]] = {}
        self.loaded: Loaded | None = None  # what the first that was ready said of its models
        self.faults: Counter[str] = Counter()  # by kind
        self.trouble = ""  # the latest fault, in one line

    @property
    def starting(self) -> int:
        """How many wait for room or load models."""
        return sum(job is not None and job.is_start for job in self._doing.values())

    @property
    def ready(self) -> int:
        """How many can evaluate."""
        return len(self._doing) - self.starting

    @property
    def busy(self) -> int:
        """How many of those are working."""
        return self.ready - list(self._doing.values()).count(None)

    @property
    def descents(self) -> list[tuple[int, Step]]:
        """The candidates whose exponents descend now, by index, with how far they are."""
        jobs = [job for job in self._doing.values() if job and job.is_candidate]
        return sorted((job.candidate.index, job.step) for job in jobs if job.step)

    def turn(self, seconds: float) -> Iterator[tuple[Job, object]]:
        """Let workers start, work, answer and stop, waiting at most this long for an answer.

        Yields jobs with their results or faults. Raises Resumable if there is no worker and none
        comes, or none can be started.
        """
        self._tick()
        self._start()
        self.assign()
        events = self.backend.events(seconds)
        self._tick()
        for number, result, timing in events:
            if job := self._doing.get(number):  # it may have been stopped meanwhile
                yield from self._take(number, job, result, timing)
        self.assign()  # before the driver turns to anything else
        for number, job in list(self._doing.items()):
            if job and self._now > job.due:
                missed = "did not start" if job.is_start else "no answer"
                yield from self._stop(number, Fault("timeout", f"timeout: {missed} in time"))
        self._check()

    def assign(self) -> None:
        """Give idle workers the jobs that wait."""
        for number, job in self._doing.items():
            if not job and (job := self.next_job()):
                job.step, job.timing = None, {}
                self._give(number, job)

    def _give(self, number: int, job: Job) -> None:
        """Let a worker do a job, or its next step: each has so much time."""
        if job.method == "load":
            seconds = self.settings.start_seconds
        else:
            assert self.loaded
            expected = max(self._longest, job.cost * self.loaded.seconds)
            seconds = (GRACE + FACTOR * expected) * 2 ** job.faults["timeout"]
        self._doing[number], job.due = job, self._now + seconds
        self.backend.give(number, job, dict(self.shared))

    def _tick(self) -> None:
        clock = self.clock()
        self._now += min(clock - self._last_clock, _LONGEST_TICK)
        self._last_clock = clock

    def _start(self) -> None:
        """Start the workers that are wanted; those for whom there is no room yet wait."""
        most = self.settings.workers
        most = self.backend.room() if most is None else max(1, most)
        for number in self._without_room[: max(0, len(self._doing) - most)]:  # a node is gone
            self.backend.stop(number)
            del self._doing[number]
        if self._now < self._next_start or self._is_refused:
            return
        for _ in range(most - len(self._doing)):
            self._started += 1
            self._doing[self._started] = arrive = Job("arrive")
            self.backend.start(self._started)
            self.backend.give(self._started, arrive, {})

    @property
    def _without_room(self) -> list[int]:
        return [number for number, job in self._doing.items() if job and job.method == "arrive"]

    def _check(self) -> None:
        """Raise Resumable if there are no workers, and none may still come."""
        if self.ready:
            self._alone_since = self._now
        if len(self._without_room) < len(self._doing):
            return  # those that load have a deadline
        if self._is_refused:
            raise Resumable(f"no worker could be started: {self.trouble}")
        why = f"; the last fault: {self.trouble}" if self.trouble else ""
        if "memory" in self.trouble:
            why += ": set low_memory=true or fewer ray.workers"
        failed = sum(kind not in ("lost", "no memory on node") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise Resumable(f"no worker could be started, {failed} times{why}")
        if self._now - self._alone_since > self.settings.wait_seconds:
            limit = f"{self.settings.wait_seconds:g} s (ray.wait_seconds)"
            raise Resumable(f"no worker for {limit}{why}")

    @property
    def _is_refused(self) -> bool:
        """Whether a worker rejected a value before any was ready: the next one would, too."""
        return self.loaded is None and "refused" in self._failed_starts

    def _take(
        self, number: int, job: Job, result: object, timing: Timing
    ) -> Iterator[tuple[Job, object]]:
        """Take a worker's answer, and yield it if it is that to a job of the pool's."""
        if isinstance(result, Fault) and (result.kind in MAX_TRIES or job.is_start):
            yield from self._stop(number, result)
        elif job.method == "arrive":  # there is room for it
            self._give(number, Job("load"))
        elif isinstance(result, Loaded) and result.digests != (self.loaded or result).digests:
            reason = f"its models are not the run's: {result.digests}"
            yield from self._stop(number, Fault("refused", reason))
        elif isinstance(result, Loaded):
            self.loaded, self._doing[number] = self.loaded or result, None
            self._failed_starts.clear()
        else:
            seconds = timing.get("seconds", 0.0)
            if job.is_candidate and not isinstance(result, Fault):
                self._longest = max(self._longest, seconds)
            seconds = round(seconds + job.timing.get("seconds", 0.0), 4)
            job.timing = {**timing, "seconds": seconds, "worker": number}
            if isinstance(result, Step):
                job.step = result
                self._give(number, job)
                return
            self._doing[number] = None
            if isinstance(result, Fault):
                self.faults[result.kind] += 1
            yield job, result

    def _stop(self, number: int, fault: Fault) -> Iterator[tuple[Job, Fault]]:
        """Stop a worker, or forget one that has ended; yield its job, if it did one."""
        self.backend.stop(number)
        job = self._doing.pop(number)
        assert job  # one that is idle is not heard of
        self.faults[fault.kind] += 1
        lacks_memory = fault.kind == "no memory on node" and self._doing
        pause = _LONGEST_BREAK if lacks_memory else 0.0
        if job.is_start:
            self._failed_starts.append(fault.kind)
            pause = min(_LONGEST_BREAK, 2.0 ** len(self._failed_starts))
        else:
            self._failed_starts.clear()
        self._next_start = max(self._next_start, self._now + pause)
        if fault.line != self.trouble:  # news
            self.say(f"a worker ended: {fault.line}")
        self.trouble = fault.line
        if not job.is_start:
            yield job, fault
