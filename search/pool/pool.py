"""The pool: workers that come and go, and the calls that they do.

A worker that is lost, runs out of memory or does not answer in time is stopped, and its job goes to
another; `Jobs` decides whom a fault is blamed on.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

from torch import Tensor

from prunevolve.command_line import check_interrupt
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Criterion
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.jobs import MOST, Arrival, Job, Jobs, PoolError
from prunevolve.search.pool.worker import LOAD, PLACE, Call, Fault, Loaded, Shared, Timing
from prunevolve.search.population import Candidate
from prunevolve.search.scale import Scale

MOST_STARTS = 3
"""Workers that may fail to start in a row while there is no other worker."""

GRACE, FACTOR = 20.0, 10.0
"""A call is given GRACE seconds plus FACTOR times its expected duration."""

_BACKWARD = 6
"""The cost of collecting statistics per token, in forward passes: an upper bound."""

_STEP_SECONDS = 0.5

_LONGEST_BREAK = 60.0
"""The upper limit of the seconds before the next start, which double with each worker that fails to
start; also the seconds after a worker was killed because its node lacked memory."""

_LONGEST_TICK = 5.0
"""Seconds that one tick counts at most: no timeout because this process was suspended."""


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


@dataclass(frozen=True)
class Staff:
    """The workers of a pool.

    Attributes:
        ready: How many can evaluate.
        busy: How many of those are working.
        starting: How many wait for room or load models.
        faults: Number of faults so far, by kind.
        trouble: The latest fault, in one line.
    """

    ready: int
    busy: int
    starting: int
    faults: Mapping[str, int]
    trouble: str


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


class Pool:
    """Workers that hold the models of a search and evaluate its candidates.

    Args:
        backend: Where they live.
        experiment: What they are built from.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.
    """

    def __init__(
        self,
        backend: Backend,
        experiment: Experiment,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._backend, self._experiment, self._ray = backend, experiment, experiment.config.ray
        self._clock, self._last_tick, self._now = clock, clock(), 0.0
        self._say, self._last_message = say, ""
        self._workers: dict[int, _Worker] = {}
        self._loaded: Loaded | None = None
        self._shared: dict[tuple[str, *tuple[int, ...]], object] = {}
        self._failed_starts: list[str] = []
        self._next_start = self._alone_since = 0.0
        self._jobs = Jobs(self._evaluation(_BASELINE))
        self._faults: Counter[str] = Counter()
        self._trouble = ""
        self._longest = 0.0

    # What the search calls

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate without waiting; an idle worker gets it at once."""
        self._jobs.add(self._evaluation(candidate), candidate)
        self._tick()
        self._assign()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None if none arrives in half a second.

        Raises:
            PoolError: If there is no worker and none comes, or no worker functions.
        """
        arrivals = self._jobs.arrivals
        self._turn(0.0 if arrivals else _STEP_SECONDS)
        return arrivals.popleft() if arrivals else None

    def losses(
        self, wanted: Sequence[tuple[int, str, Criterion | None]]
    ) -> list[list[float] | None]:
        """Return each window's mean NLL in nats per token, for tasks, texts and criteria.

        Without a criterion, the dense model's; None where one is degenerate on the model.

        Raises:
            ValueError: If a value is wrong; one line.
            CallError: If a call failed for a reason of its own.
            PoolError: As in `next_outcome`.
        """
        return [
            cast("list[float] | None", result)
            for result in self._results(
                Call("losses", one, 2 * self._tokens(one[0], one[1])) for one in wanted
            )
        ]

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Return a model's statistics, by `X/layer`; raises as `losses` does."""
        windows = self._experiment.subjects[subject].windows["calibration"]
        tokens = _BACKWARD * windows.tokens.numel()
        (found,) = self._results([Call("collect_statistics", (subject,), tokens)])
        return cast("dict[str, Tensor]", found)

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; raises as `losses` does."""
        (found,) = self._results([Call("probe_tensors", (subject,))])
        return cast("dict[str, Tensor]", found)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Let all workers use a model's statistics from now on."""
        self._shared["use_statistics", subject] = self._backend.share(tensors)

    def use_scale(self, scale: Scale) -> None:
        """Let all workers measure candidates on this scale from now on."""
        self._shared["use_scale",] = self._backend.share(scale)

    @contextmanager
    def counting(self, count: Callable[[], object]) -> Iterator[None]:
        """Call a function for each result of `losses` inside the context."""
        before, self._jobs.count = self._jobs.count, count
        try:
            yield
        finally:
            self._jobs.count = before

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of those dense weights of the models that get pruned; waits for a worker."""
        while self._loaded is None:
            self._turn(_STEP_SECONDS)
        return self._loaded.digests

    @property
    def staff(self) -> Staff:
        """The current workers, and the faults so far."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        busy = sum(worker.job is not None for worker in ready)
        starting = len(self._workers) - len(ready)
        return Staff(len(ready), busy, starting, dict(self._faults), self._trouble)

    def _results(self, calls: Iterable[Call]) -> list[object]:
        jobs = [self._jobs.add(call) for call in calls]
        while not all(job.done for job in jobs):
            self._turn(_STEP_SECONDS)
        return [job.result for job in jobs]

    def _evaluation(self, candidate: Candidate) -> Call:
        tasks = self._experiment.tasks_of("fitness")
        tokens = sum(self._tokens(task, "fitness") for task in tasks)
        return Call("evaluate", (candidate,), tokens)

    def _tokens(self, task: int, role: str) -> int:
        subject = self._experiment.subjects[self._experiment.subject_of[task]]
        return subject.windows[role].tokens.numel()

    # One turn: workers are started, get work, answer, are stopped

    def _turn(self, seconds: float) -> None:
        check_interrupt()
        self._tick()
        self._start()
        self._assign()
        events = self._backend.events(seconds)
        self._tick()
        for event in events:
            if event.worker in self._workers:  # it may have been stopped meanwhile
                self._take(event, self._workers[event.worker])
        self._assign()  # before the driver turns to anything else
        self._stop_late()
        if not self._jobs.arrivals:
            self._check_workers()

    def _tick(self) -> None:
        """Advance `_now` by the time since the last tick."""
        clock = self._clock()
        self._now += min(clock - self._last_tick, _LONGEST_TICK)
        self._last_tick = clock

    def _start(self) -> None:
        """Start the workers that are wanted; those for whom there is no room yet wait."""
        most = self._backend.room() if self._ray.workers is None else max(1, self._ray.workers)
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
        if not self._workers:
            self._tell("no room for a worker now")

    def _assign(self) -> None:
        for number, worker in self._workers.items():
            if worker.call or not (job := self._jobs.next()):
                continue
            worker.job, worker.call = job, job.call
            worker.due = self._now + self._allowed(job)
            self._backend.call(number, job.call, dict(self._shared))

    def _allowed(self, job: Job) -> float:
        """Return the seconds after which a job's call times out; they double each time."""
        assert self._loaded
        all_tokens = self._evaluation(_BASELINE).tokens
        expected = max(self._loaded.seconds * job.call.tokens / max(1, all_tokens), self._longest)
        return float((GRACE + FACTOR * expected) * 2 ** job.faults["timeout"])

    def _stop_late(self) -> None:
        """Stop the workers that should have started or answered by now."""
        for number, worker in list(self._workers.items()):
            if worker.due is not None and worker.call and self._now > worker.due:
                missed = "no answer" if worker.ready else "did not start"
                self._stop(number, Fault("timeout", f"timeout: {missed} in time"))

    def _check_workers(self) -> None:
        """Check that there are workers, or that some may still come.

        Raises:
            PoolError: If there are none, and the limits on waiting and on failed starts are hit.
        """
        if any(worker.ready for worker in self._workers.values()):
            self._alone_since = self._now
        if any(worker.due is not None for worker in self._workers.values()):
            return  # those that load have a deadline
        if self._is_refused:
            raise PoolError(f"no worker could be started: {self._trouble}")
        why = f"; the last fault: {self._trouble}" if self._trouble else ""
        if "memory" in self._trouble:
            why += ": set low_memory=true or fewer ray.workers"
        failed = sum(kind not in ("lost", "no memory on node") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {failed} times{why}")
        if self._now - self._alone_since > self._ray.wait_seconds:
            raise PoolError(f"no worker for {self._ray.wait_seconds:g} s (ray.wait_seconds){why}")

    @property
    def _is_refused(self) -> bool:
        """Whether a worker rejected a value before any was ready: the next one would, too."""
        return self._loaded is None and "refused" in self._failed_starts

    # What workers answer

    def _take(self, event: Event, worker: _Worker) -> None:
        call, job = worker.call, worker.job
        worker.call = worker.job = None
        match event.result:
            case Fault() as fault if fault.kind in MOST or not job:
                worker.call, worker.job = call, job
                self._stop(event.worker, fault)
            case Loaded() as loaded if self._loaded and loaded.digests != self._loaded.digests:
                reason = f"its models are not the run's: {loaded.digests}"
                self._stop(event.worker, Fault("refused", reason))
            case Loaded() as loaded:
                self._loaded = self._loaded or loaded
                worker.ready = True
                self._failed_starts.clear()
            case None if call == PLACE:
                worker.call, worker.due = LOAD, self._now + self._ray.start_seconds
                self._backend.call(event.worker, LOAD, dict(self._shared))
            case result if job:
                job.timing = {**event.timing, "worker": event.worker}
                if isinstance(result, Fault):
                    self._faults[result.kind] += 1
                elif job.candidate:
                    self._longest = max(self._longest, event.timing.get("seconds", 0.0))
                self._jobs.answer(job, result)

    def _stop(self, number: int, fault: Fault) -> None:
        """Stop a worker, or forget one that has ended; its job, if it had one, met the fault."""
        self._backend.stop(number)
        worker = self._workers.pop(number)
        self._faults[fault.kind] += 1
        self._trouble = fault.line
        lacks_memory = fault.kind == "no memory on node" and self._workers
        pause = _LONGEST_BREAK if lacks_memory else 0.0
        if worker.ready:
            self._failed_starts.clear()
        else:
            self._failed_starts.append(fault.kind)
            pause = min(_LONGEST_BREAK, 2.0 ** len(self._failed_starts))
        self._next_start = self._now + pause
        if not self._is_refused:
            self._tell(f"a worker ended: {fault.line}")
        if worker.job:
            self._jobs.retry(worker.job, fault)

    def _tell(self, message: str) -> None:
        """Show what happened, unless it repeats the last message."""
        if not self._workers:
            message += f"; waiting {self._ray.wait_seconds:g} s for one (ray.wait_seconds)"
        if message != self._last_message:
            self._last_message = message
            self._say(message)


_BASELINE = Candidate(-1, BASELINES["wanda"].criterion)
"""What is evaluated to see whether the workers work."""
