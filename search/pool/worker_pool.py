"""A pool of workers that come and go: who does what, and what a fault means.

One policy for every crew. A worker that is lost, lacks memory or does not answer in time is
dismissed, and its call is given to another. A call that keeps coming to such an end is suspected
to cause it; it is found to be the cause once any other call succeeds. Where none can, a baseline
is evaluated to tell; if that fails too, it is the pool that is of no use, and nothing is blamed.
"""

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from pruning.baselines import BASELINES
from search.fitness import Setup, ZerosAndOverlap
from search.pool.crew import Call, Crew, Ended, Event, Fault, Started
from search.pool.protocol import (
    Arrival,
    CallError,
    LossRequest,
    MaskRequest,
    PoolError,
    Staff,
    Timing,
)
from search.population import Candidate, Outcome

MOST = {"lost": 5, "crowded": 5, "exhausted": 3, "late": 3}
"""How often a call may come to a fault of a kind before it is suspected to be its cause."""

MOST_SUSPECTS = 3
"""Suspected candidates, without any success between, after which a baseline is evaluated."""

MOST_STARTS = 3
"""Workers that may fail to start one after the other while there is none."""

GRACE, FACTOR = 20.0, 10.0
"""A call has seconds of grace and so many times what it should take before it counts as hung."""

_BACKWARD = 6
"""What collecting statistics costs a token, in forward passes, from above."""

_LOOK_SECONDS = 2.0
"""Between two looks for room for more workers."""

_STEP_SECONDS = 0.5

_LONGEST_STEP = 5.0
"""What a step counts at most: while this process is stopped, nobody is late."""

_WITNESS = Candidate(-1, BASELINES["wanda"].criterion)
"""What is evaluated to tell whether the workers are of any use."""


@dataclass(eq=False)
class _Job:
    """A call on its way to a result.

    Attributes:
        candidate: What is evaluated, if it is an evaluation.
        worker: The only one that it is for, if it prepares a worker.
        faults: How often it came to each kind of fault.
        result: What came of it at last: a value or a fault.
        done: Whether it is tried no more.
    """

    call: Call
    candidate: Candidate | None = None
    worker: int | None = None
    faults: Counter[str] = field(default_factory=Counter)
    result: object = None
    timing: Timing = field(default_factory=dict)
    done: bool = False


@dataclass(eq=False)
class _Worker:
    """A worker that starts, waits (ready and no job) or is busy.

    Attributes:
        due: When it should have started, or its job should be done.
        briefed: How many models' statistics it was given.
    """

    due: float
    ready: bool = False
    briefed: int = 0
    job: _Job | None = None


class WorkerPool:
    """Workers of a crew, as a `Pool`.

    Args:
        crew: Where they live.
        setup: What they are built from.
        workers: How many at most; None for all that there is room for, now and later.
        wait_seconds: How long to go on without any worker.
        start_seconds: How long a worker may take to start.
    """

    def __init__(
        self,
        crew: Crew,
        setup: Setup,
        workers: int | None,
        wait_seconds: float,
        start_seconds: float,
    ) -> None:
        self._crew, self._setup = crew, setup
        self._most = workers
        self._wait_seconds, self._start_seconds = wait_seconds, start_seconds
        self._workers: dict[int, _Worker] = {}
        self._queue: deque[_Job] = deque()
        self._suspects: list[_Job] = []
        self._witness: _Job | None = None
        self._arrivals: deque[Arrival] = deque()
        self._briefings: list[Call] = []
        self._digests: tuple[str, ...] | None = None
        self._faults: Counter[str] = Counter()
        self._failed_starts = 0
        self._trouble = ""
        self._pace = self._longest = 0.0
        self._now = self._next_look = self._alone_since = 0.0
        self._clock = time.monotonic()

    # What the search asks for

    def submit(self, candidate: Candidate) -> None:
        """Take a candidate; a worker that waits gets it at once."""
        self._queue.append(self._evaluation(candidate))
        self._assign()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None if none came in half a second.

        Raises:
            PoolError: If there is no worker and none comes, or no worker is of any use.
        """
        if not self._arrivals:
            self._turn()
        return self._arrivals.popleft() if self._arrivals else None

    def collect_statistics(self, subject: int) -> Mapping[str, Tensor]:
        """Collect a model's statistics, by `X/layer`."""
        tokens = _BACKWARD * self._setup.windows[subject]["calibration"].numel()
        return cast(Mapping[str, Tensor], self._do("collect_statistics", (subject,), tokens))

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a model's statistics to every worker, now or before its first evaluation."""
        shared = self._crew.share(tensors)
        self._briefings.append(Call("use_statistics", (subject, shared), 0))
        self._assign()

    def probe_tensors(self, subject: int) -> Mapping[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.fingerprint`."""
        return cast(Mapping[str, Tensor], self._do("probe_tensors", (subject,), 0))

    def model_digest(self, subject: int) -> str:
        """Return a hash of a model's dense weights that are pruned, the same in all workers."""
        while self._digests is None:
            self._turn()
        return self._digests[subject]

    def losses(self, requests: Sequence[LossRequest]) -> list[list[float] | None]:
        """Return each window's mean NLL in nats per token, for each request in order."""
        calls = []
        for request in requests:
            windows = self._setup.windows[self._setup.tasks[request.task].subject]
            arguments = (request.task, request.role, request.criterion)
            calls.append(Call("losses", arguments, 2 * windows[request.role].numel()))
        return cast(list[list[float] | None], self._do_all(calls))

    def zeros_and_overlap(self, requests: Sequence[MaskRequest]) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""
        tokens = self._fitness_tokens
        calls = [Call("zeros_and_overlap", (r.task, r.one, r.other), tokens) for r in requests]
        return cast(list[ZerosAndOverlap], self._do_all(calls))

    @property
    def staff(self) -> Staff:
        """The workers now, and what went wrong so far."""
        ready = [worker for worker in self._workers.values() if worker.ready]
        busy = sum(worker.job is not None for worker in ready)
        starting = len(self._workers) - len(ready)
        return Staff(len(ready), busy, starting, dict(self._faults), self._trouble)

    # Calls

    @property
    def _fitness_tokens(self) -> int:
        tasks = self._setup.tasks
        return sum(self._setup.windows[task.subject]["fitness"].numel() for task in tasks)

    def _evaluation(self, candidate: Candidate) -> _Job:
        return _Job(Call("evaluate", (candidate,), self._fitness_tokens), candidate)

    def _do(self, method: str, arguments: tuple[object, ...], tokens: int) -> object:
        return self._do_all([Call(method, arguments, tokens)])[0]

    def _do_all(self, calls: Sequence[Call]) -> list[object]:
        """Return the results of calls that the run cannot do without.

        Raises:
            ValueError: If a value in one was wrong; one line.
            CallError: If one failed for a reason of its own.
            PoolError: As `next_outcome`.
        """
        jobs = [_Job(call) for call in calls]
        self._queue.extend(jobs)
        while not all(job.done for job in jobs):
            self._turn()
        return [job.result for job in jobs]

    # One turn: workers come, get work, report, are dismissed

    def _turn(self) -> None:
        self._tick()
        self._hire()
        self._call_witness()
        self._assign()
        for event in self._crew.events(_STEP_SECONDS):
            self._take(event)
        self._assign()  # before the driver does anything else
        self._tick()
        self._dismiss_late()
        self._give_up()

    def _tick(self) -> None:
        clock = time.monotonic()
        self._now += min(clock - self._clock, _LONGEST_STEP)
        self._clock = clock

    def _hire(self) -> None:
        if self._now < self._next_look:
            return
        self._next_look = self._now + _LOOK_SECONDS
        if self._most is not None and len(self._workers) >= self._most:
            return
        missing = self._crew.room()
        if self._most is not None:
            missing = min(missing, self._most - len(self._workers))
            self._crew.wish(self._most)
        for _ in range(missing):
            self._workers[self._crew.hire()] = _Worker(self._now + self._start_seconds)

    def _assign(self) -> None:
        for number, worker in self._workers.items():
            if not worker.ready or worker.job:
                continue
            if worker.briefed < len(self._briefings):
                job = _Job(self._briefings[worker.briefed], worker=number)
                worker.briefed += 1
            elif self._queue:
                job = self._queue.popleft()
            else:
                continue
            worker.job = job
            worker.due = self._now + self._allowed(job)
            self._crew.give(number, job.call)

    def _allowed(self, job: _Job) -> float:
        """Return the seconds after which a job counts as hung; twice as many at each try."""
        if job.worker is not None:
            return self._start_seconds
        expected = self._pace * job.call.tokens
        if job.call.method == "evaluate":
            expected = max(expected, self._longest)
        return float((GRACE + FACTOR * expected) * 2 ** job.faults["late"])

    def _take(self, event: Event) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return  # dismissed meanwhile
        if isinstance(event, Started):
            self._welcome(event, worker)
        elif isinstance(event, Ended):
            self._part(event.worker, event.fault)
        else:
            job, worker.job = worker.job, None
            assert job
            job.timing = {**event.timing, "worker": event.worker}
            if isinstance(event.result, Fault):
                self._stumble(event.worker, job, event.result)
            elif job.worker is None:
                self._succeed(job, event.result)

    def _welcome(self, event: Started, worker: _Worker) -> None:
        if self._digests not in (None, event.digests):
            reason = f"its models are not the run's: {event.digests}, not {self._digests}"
            self._crew.dismiss(event.worker)
            self._part(event.worker, Fault("refused", reason))
            return
        self._digests = event.digests
        self._pace = max(self._pace, event.seconds / max(1, self._fitness_tokens))
        worker.ready = True
        self._failed_starts = 0

    def _part(self, number: int, fault: Fault) -> None:
        """Do without a worker from now on, which is no more; its job is for another."""
        worker = self._workers.pop(number)
        job = worker.job
        self._faults[fault.kind] += 1
        self._trouble = fault.reason
        if fault.kind == "crowded" and self._faults["crowded"] > 1:
            self._most = max(1, len(self._workers))
        if not worker.ready or (job and job.worker is not None):
            self._failed_starts += fault.kind not in ("lost", "crowded")
            self._next_look = self._now + min(60.0, 2.0**self._failed_starts)
            if fault.kind == "refused" and self._digests is None:
                raise ValueError(f"a worker failed in starting: {fault.reason}")
            return
        self._next_look = min(self._next_look, self._now)
        if job:
            self._count(job, fault)

    def _stumble(self, number: int, job: _Job, fault: Fault) -> None:
        """Decide what a fault means that a worker reports, and whether it may stay."""
        if fault.kind not in MOST and job.worker is None:
            self._faults[fault.kind] += 1
            self._end(job, fault)
            return
        self._workers[number].job = job
        self._crew.dismiss(number)
        self._part(number, fault)

    def _count(self, job: _Job, fault: Fault) -> None:
        """Give a job to another worker, or suspect it."""
        job.faults[fault.kind] += 1
        if job.faults[fault.kind] < MOST[fault.kind]:
            self._queue.appendleft(job)
            return
        job.result = fault
        if job.candidate is None or job is self._witness:
            raise PoolError(f"no worker is of use: {_again(job, fault)}")
        self._suspects.append(job)

    def _succeed(self, job: _Job, result: object) -> None:
        if job.candidate:
            self._longest = max(self._longest, job.timing.get("seconds", 0.0))
        # Workers are of use, so whoever brought some of them down is the cause.
        suspects, self._suspects = self._suspects, []
        for suspect in suspects:
            assert isinstance(suspect.result, Fault)
            self._end(suspect, suspect.result)
        if job is self._witness:
            self._witness = None
        else:
            self._end(job, result)

    def _end(self, job: _Job, result: object) -> None:
        job.result, job.done = result, True
        fault = result if isinstance(result, Fault) else None
        if job.candidate:
            outcome = result
            if fault:
                outcome = Outcome("failed", reason=_again(job, fault))
            assert isinstance(outcome, Outcome)
            trace = fault.trace if fault else ""
            self._arrivals.append(Arrival(job.candidate.index, outcome, job.timing, trace))
        elif fault and fault.kind == "refused":
            raise ValueError(f"a worker failed in {job.call.method}: {fault.reason}")
        elif fault:
            raise CallError(f"a worker failed in {job.call.method}: {fault.reason}", fault.trace)

    def _call_witness(self) -> None:
        """Evaluate a baseline if nothing else will tell whether suspects are the cause."""
        others = self._queue or any(
            worker.job and worker.job.candidate for worker in self._workers.values()
        )
        if self._witness or not self._suspects:
            return
        if not others or len(self._suspects) >= MOST_SUSPECTS:
            self._witness = self._evaluation(_WITNESS)
            self._queue.appendleft(self._witness)

    def _dismiss_late(self) -> None:
        for number, worker in list(self._workers.items()):
            if (worker.job or not worker.ready) and self._now > worker.due:
                doing = worker.job.call.method if worker.job else "its start"
                self._crew.dismiss(number)
                self._part(number, Fault("late", f"timeout: no answer to {doing} in time"))

    def _give_up(self) -> None:
        """Raise PoolError if there is no worker, and none to be expected."""
        if any(worker.ready for worker in self._workers.values()):
            self._alone_since = self._now
        if self._workers:
            return  # those that start have a time by which they must
        why = f"; the last trouble: {self._trouble}" if self._trouble else ""
        if self._failed_starts >= MOST_STARTS:
            raise PoolError(f"no worker could be started, {self._failed_starts} times{why}")
        if self._now - self._alone_since > self._wait_seconds:
            raise PoolError(f"no worker for {self._wait_seconds:g} s (ray.wait_seconds){why}")


def _again(job: _Job, fault: Fault) -> str:
    """Return the reason of a failure, the same wherever and whenever it happens."""
    times = job.faults[fault.kind]
    if fault.kind in ("lost", "crowded"):
        return f"ended every worker that it was given to, {times} of {times}: {fault.reason}"
    return f"{fault.reason}, {times} times" if times > 1 else fault.reason
