"""The pool: workers that come and go, the requests they do, and whom a fault is blamed on.

A worker that is lost, runs out of memory or does not answer in time is dismissed, and its job goes
to another. A candidate that has used up all tries but one is *suspected*, and set aside until
another job is answered: then the workers are known to work, and if the candidate fails once more,
it is the cause. If no other job can settle this, a baseline is evaluated. If the baseline fails as
often, or several candidates in a row are suspected, the pool itself is broken and none is blamed.
"""

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import cast

from torch import Tensor

from prunevolve.command_line import Resumable
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Criterion
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.requests import (
    Backend,
    CollectStatistics,
    Ended,
    Evaluate,
    Event,
    Fault,
    FaultKind,
    ProbeTensors,
    Reply,
    Request,
    Result,
    Started,
    Timing,
    UseScale,
    UseStatistics,
    WindowLosses,
)
from prunevolve.search.population import Candidate, Outcome
from prunevolve.search.scale import Scale

MOST = {"lost": 8, "crowded": 5, "exhausted": 3, "late": 3}
"""How often a job may meet a fault of each kind; its last try follows a success elsewhere."""

MOST_SUSPECTS = 5
"""Candidates that may be suspected in a row, with no candidate evaluated in between."""

MOST_STARTS = 3
"""Workers that may fail to start in a row while there is no other worker."""

GRACE, FACTOR = 20.0, 10.0
"""A request counts as hung after GRACE seconds plus FACTOR times its expected duration."""

_BACKWARD = 6
"""The cost of collecting statistics per token, in forward passes: an upper bound."""

_STEP_SECONDS = 0.5

_LOOK_SECONDS = 2.0
"""Seconds between two attempts to hire."""

_LONGEST_LOOK = 60.0
"""The upper limit of this interval, which doubles with each worker that fails to start; also the
interval after a worker that was ended because its node lacked memory."""

_LONGEST_TICK = 5.0
"""Seconds that one tick counts at most: nobody is late because this process was suspended."""

_NO_LIMIT = 10**5

_BASELINE = Evaluate(Candidate(-1, BASELINES["wanda"].criterion))


class PoolError(Resumable):
    """The workers are gone or unusable; the run can be resumed once they are back."""


class CallError(RuntimeError):
    """A request that the run cannot do without failed for a reason of its own, not a worker's.

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


@dataclass(frozen=True)
class Staff:
    """The workers of a pool.

    Attributes:
        ready: How many can evaluate.
        busy: How many of those are working.
        starting: How many are loading models or statistics.
        faults: Number of faults so far, by kind.
        trouble: The latest fault, in one line.
    """

    ready: int
    busy: int
    starting: int
    faults: Mapping[str, int]
    trouble: str


@dataclass(eq=False)
class _Job:
    """A request that needs a result, from any worker.

    Attributes:
        number: Its position in the order of arrival; -1 for the baseline.
        faults: How often it met each kind of fault.
        result: A value or a fault, final once it is done.
    """

    request: Request[object]
    number: int
    faults: Counter[str] = field(default_factory=Counter)
    result: object = None
    timing: Timing = field(default_factory=dict)
    done: bool = False

    @property
    def candidate(self) -> Candidate | None:
        """The candidate of the search that it evaluates; it may fail without ending the run."""
        if isinstance(self.request, Evaluate) and self.request is not _BASELINE:
            return self.request.candidate
        return None

    def reason(self, fault: Fault) -> str:
        """Return why it failed; the text is the same wherever and whenever it happens."""
        times = self.faults[fault.kind]
        if fault.kind in ("lost", "crowded"):
            return f"ended every worker that it was given to, {times} of {times}: {fault.reason}"
        return f"{fault.reason}, {times} times" if times > 1 else fault.line


@dataclass(eq=False)
class _Worker:
    """A worker that is starting, waiting or doing a request.

    Attributes:
        due: When it must have started, or finished its request.
        ready: Whether it holds its models.
        prepared: How many of the pool's preparations it has done.
        job: The job that its request belongs to; None for a preparation.
    """

    due: float
    ready: bool = False
    prepared: int = 0
    request: Request[object] | None = None
    job: _Job | None = None


class Pool:
    """Workers that hold the models of a search and evaluate its candidates.

    Args:
        backend: Where they live.
        setup: What they are built from.
        workers: The most to hire; None for as many as there is room for, now and later.
        wait_seconds: How long to go on without any worker that can evaluate.
        start_seconds: How long a worker may take to start.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.
    """

    def __init__(
        self,
        backend: Backend,
        setup: Experiment,
        workers: int | None,
        wait_seconds: float,
        start_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._backend, self._setup = backend, setup
        self._most = _NO_LIMIT if workers is None else workers
        self._wait_seconds, self._start_seconds = wait_seconds, start_seconds
        self._clock, self._last_tick, self._now = clock, clock(), 0.0
        self._say, self._last_message = say, ""
        self._workers: dict[int, _Worker] = {}
        self._digests: tuple[str, ...] | None = None
        self._preparations: list[Request[None]] = []
        self._failed_starts: list[FaultKind] = []
        self._next_look = self._alone_since = 0.0
        self._numbers = count()
        self._queue: list[_Job] = []
        self._suspects: list[_Job] = []
        self._in_a_row: set[_Job] = set()
        self._arrivals: deque[Arrival] = deque()
        self._faults: Counter[str] = Counter()
        self._trouble = ""
        self._pace = self._longest = 0.0
        self._count: Callable[[], object] = lambda: None

    # What the search calls

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate without waiting; an idle worker gets it at once."""
        self._enqueue(Evaluate(candidate))
        self._tick()
        self._assign()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None if none arrives in half a second.

        Raises:
            PoolError: If there is no worker and none comes, or no worker functions.
        """
        self._turn(0.0 if self._arrivals else _STEP_SECONDS)
        return self._arrivals.popleft() if self._arrivals else None

    def ask(self, requests: Sequence[Request[Result]]) -> list[Result]:
        """Return the results of requests that the run cannot do without, in order.

        Raises:
            ValueError: If a request had a wrong value; one line.
            CallError: If a request failed for a reason of its own.
            PoolError: As in `next_outcome`.
        """
        jobs = [self._enqueue(request) for request in requests]
        while not all(job.done for job in jobs):
            self._turn(_STEP_SECONDS)
        return [cast(Result, job.result) for job in jobs]

    @contextmanager
    def counting(self, count: Callable[[], object]) -> Iterator[None]:
        """Call a function for each answer to `ask` inside the context."""
        before, self._count = self._count, count
        try:
            yield
        finally:
            self._count = before

    def prepare(self, request: UseStatistics | UseScale) -> None:
        """Give statistics or a scale to every worker, now or before its first job."""
        self._preparations.append(self._backend.share(request))
        self._assign()

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of those dense weights that get pruned, the same in all workers."""
        while self._digests is None:
            self._turn(_STEP_SECONDS)
        return self._digests

    def losses(
        self, asked: Sequence[tuple[int, str, Criterion | None]]
    ) -> list[list[float] | None]:
        """Return the losses by window of each task, role and criterion."""
        return self.ask([WindowLosses(*request) for request in asked])

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Return a model's statistics."""
        return self.ask([CollectStatistics(subject)])[0]

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return a model's probe."""
        return self.ask([ProbeTensors(subject)])[0]

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Let all workers use a model's statistics."""
        self.prepare(UseStatistics(subject, tensors))

    def use_scale(self, scale: Scale) -> None:
        """Let all workers use a scale."""
        self.prepare(UseScale(scale))

    @property
    def staff(self) -> Staff:
        """The current workers, and the faults so far."""
        fit = [worker for worker in self._workers.values() if self._is_fit(worker)]
        busy = sum(worker.job is not None for worker in fit)
        starting = len(self._workers) - len(fit)
        return Staff(len(fit), busy, starting, dict(self._faults), self._trouble)

    def _enqueue(self, request: Request[object]) -> _Job:
        job = _Job(request, next(self._numbers))
        self._queue.append(job)
        return job

    # One turn: workers are hired, get work, report, are dismissed

    def _turn(self, seconds: float) -> None:
        self._tick()
        self._hire()
        self._assign()
        events = self._backend.events(seconds)
        self._tick()
        for event in events:
            if event.worker in self._workers:  # it may have been dismissed meanwhile
                self._take(event, self._workers[event.worker])
        self._assign()  # before the driver turns to anything else
        self._dismiss_late()
        if not self._arrivals:
            self._check_workers()

    def _tick(self) -> None:
        """Advance `_now` by the time since the last tick."""
        clock = self._clock()
        self._now += min(clock - self._last_tick, _LONGEST_TICK)
        self._last_tick = clock

    def _hire(self) -> None:
        """Hire as many workers as are wanted and fit, if the next attempt is due."""
        wanted = self._most - len(self._workers)
        if self._now < self._next_look or wanted <= 0 or self._is_refused or self._waited_enough:
            return
        self._next_look = self._now + _LOOK_SECONDS
        for number in self._backend.hire(wanted):
            self._workers[number] = _Worker(self._now + self._start_seconds)
        if not self._workers:
            self._tell("no room for a worker now")

    def _assign(self) -> None:
        for number, worker in self._workers.items():
            if not worker.ready or worker.request:
                continue
            if not self._is_fit(worker):
                worker.request, seconds = self._preparations[worker.prepared], self._start_seconds
            elif job := self._next_job():
                worker.job, worker.request, seconds = job, job.request, self._allowed(job)
            else:
                continue
            worker.due = self._now + seconds
            self._backend.give(number, worker.request)

    def _next_job(self) -> _Job | None:
        """Return the next job in order of arrival; a baseline if only it can settle a suspicion."""
        if self._queue:
            return self._queue.pop(0)
        if self._suspects and not any(worker.job for worker in self._workers.values()):
            return _Job(_BASELINE, -1)
        return None

    def _allowed(self, job: _Job) -> float:
        """Return the seconds after which a job counts as hung; they double at each timeout."""
        expected = max(self._pace * self._tokens(job.request), self._longest)
        return float((GRACE + FACTOR * expected) * 2 ** job.faults["late"])

    def _tokens(self, request: Request[object]) -> int:
        """Return roughly how many tokens pass through a model."""
        subjects, subject_of = self._setup.subjects, self._setup.subject_of
        match request:
            case CollectStatistics(subject):
                return _BACKWARD * subjects[subject].tokens["calibration"].numel()
            case WindowLosses(task, role):
                return 2 * subjects[subject_of[task]].tokens[role].numel()
        return sum(subjects[subject].tokens["fitness"].numel() for subject in subject_of)

    def _dismiss_late(self) -> None:
        """Dismiss the workers that should have started or answered by now."""
        for number, worker in list(self._workers.items()):
            if self._now > worker.due and (worker.request or not worker.ready):
                missed = "no answer" if worker.request else "did not start"
                self._dismiss(number, Fault("late", f"timeout: {missed} in time"))

    def _check_workers(self) -> None:
        """Check that there are workers, or that some may still come.

        Raises:
            PoolError: If there are none, and the limits on waiting and on failed starts are hit.
        """
        if any(self._is_fit(worker) for worker in self._workers.values()):
            self._alone_since = self._now
        if self._workers:
            return  # starting workers have a deadline
        if self._is_refused:
            raise PoolError(f"no worker could be started: {self._trouble}")
        why = f"; the last fault: {self._trouble}" if self._trouble else ""
        if "memory" in self._trouble:
            why += ": set low_memory=true or fewer ray.workers"
        failed = sum(kind not in ("lost", "crowded") for kind in self._failed_starts)
        if failed >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {failed} times{why}")
        if self._waited_enough:
            raise PoolError(f"no worker for {self._wait_seconds:g} s (ray.wait_seconds){why}")

    @property
    def _waited_enough(self) -> bool:
        return self._now - self._alone_since > self._wait_seconds

    @property
    def _is_refused(self) -> bool:
        """Whether a worker rejected a value before any was ready: the next one would, too."""
        return self._digests is None and "refused" in self._failed_starts

    def _is_fit(self, worker: _Worker) -> bool:
        """Whether a worker can evaluate: it holds the models and is prepared."""
        return worker.ready and worker.prepared == len(self._preparations)

    # What workers report

    def _take(self, event: Event, worker: _Worker) -> None:
        match event:
            case Ended(number, fault):
                self._remove(number, fault)
            case Started(number, digests) if self._digests not in (None, digests):
                reason = f"its models are not the run's: {digests}, not {self._digests}"
                self._dismiss(number, Fault("refused", reason))
            case Started(_, digests, seconds):
                self._digests = digests
                self._pace = max(self._pace, seconds / max(1, self._tokens(_BASELINE)))
                worker.ready = True
                self._note_fit(worker)
            # The worker, not the job, is at fault.
            case Reply(number, Fault() as fault) if fault.kind in MOST or not worker.job:
                self._dismiss(number, fault)
            case Reply(number, result, timing):
                job, worker.job, worker.request = worker.job, None, None
                if job:
                    job.timing = {**timing, "worker": number}
                    self._answer(job, result)
                else:
                    worker.prepared += 1
                    self._note_fit(worker)

    def _note_fit(self, worker: _Worker) -> None:
        if self._is_fit(worker):
            self._failed_starts.clear()

    def _dismiss(self, number: int, fault: Fault) -> None:
        self._backend.dismiss(number)
        self._remove(number, fault)

    def _remove(self, number: int, fault: Fault) -> None:
        """Remove a worker that has ended; its job, if it had one, met the fault."""
        worker = self._workers.pop(number)
        self._faults[fault.kind] += 1
        self._trouble = fault.line
        if not self._is_fit(worker):
            self._failed_starts.append(fault.kind)
            self._next_look = self._now + min(_LONGEST_LOOK, 2.0 ** len(self._failed_starts))
        else:
            self._failed_starts.clear()
            lacks_memory = fault.kind == "crowded" and self._workers
            self._next_look = self._now + (_LONGEST_LOOK if lacks_memory else 0.0)
        if not self._is_refused:
            self._tell(f"a worker ended: {fault.line}")
        if worker.job:
            self._retry(worker.job, fault)

    def _tell(self, message: str) -> None:
        """Show what happened, unless it repeats the last message."""
        if not self._workers:
            message += f"; waiting {self._wait_seconds:g} s for one (ray.wait_seconds)"
        if message != self._last_message:
            self._last_message = message
            self._say(message)

    # Whom a fault is blamed on

    def _retry(self, job: _Job, fault: Fault) -> None:
        """Queue a job again, ahead of all later ones; set it aside, or end it after its last try.

        Raises:
            PoolError: If this shows that the pool is broken.
        """
        job.faults[fault.kind] += 1
        left = MOST[fault.kind] - job.faults[fault.kind]
        if left > 1 or (left == 1 and not job.candidate):
            self._requeue(job)
        elif left == 1:
            self._suspects.append(job)
            self._in_a_row.add(job)
            if len(self._in_a_row) >= MOST_SUSPECTS:
                raise PoolError(
                    f"no worker functions: {MOST_SUSPECTS} candidates in a row, the last of them "
                    f"{job.reason(fault)}"
                )
        elif job.candidate:
            self._end(job, fault)
        else:
            raise PoolError(f"no worker functions: {job.reason(fault)}")

    def _requeue(self, job: _Job) -> None:
        insort(self._queue, job, key=lambda queued: queued.number)

    def _answer(self, job: _Job, result: object) -> None:
        """Note that a worker answered, whatever the result: suspects get their last try."""
        if isinstance(result, Fault):
            self._faults[result.kind] += 1
        elif job.candidate:
            self._longest = max(self._longest, job.timing.get("seconds", 0.0))
            self._in_a_row.clear()
        while self._suspects:
            self._requeue(self._suspects.pop())
        if job.request is not _BASELINE:
            self._end(job, result)

    def _end(self, job: _Job, result: object) -> None:
        """Deliver the final result of a job: a value or a fault."""
        job.result, job.done = result, True
        if job.candidate:
            outcome, trace = result, ""
            if isinstance(result, Fault):
                outcome, trace = Outcome("failed", reason=job.reason(result)), result.trace
            assert isinstance(outcome, Outcome)
            self._arrivals.append(Arrival(job.candidate.index, outcome, job.timing, trace))
        elif isinstance(result, Fault):
            failed = f"a worker failed in {type(job.request).__name__}"
            if result.kind == "refused":
                raise ValueError(f"{failed}: {result.reason}")
            raise CallError(f"{failed}: {job.reason(result)}", result.trace)
        else:
            self._count()
