"""A pool of workers that come and go: which worker does which job, and for how long.

The policy is the same for every crew. A worker that is lost, runs out of memory or does not answer
in time is dismissed, and its job goes to another; `search.pool.jobs` decides what is to blame. A
worker that has been silent for a while is pinged before it gets a job, so that the job is not
blamed for a worker that had already gone.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import Tensor

from pruning.progress import Progress
from search.fitness import Setup, ZerosAndOverlap
from search.pool.crew import Call, Crew, Ended, Event, Fault, Reply, Started
from search.pool.jobs import MOST, Job, Jobs
from search.pool.protocol import (
    Arrival,
    CallError,
    Count,
    LossRequest,
    MaskRequest,
    PoolError,
    Staff,
    uncounted,
)
from search.pool.roster import Roster
from search.population import Candidate, Outcome
from search.resident import unwatched
from search.scale import Scale

GRACE, FACTOR = 20.0, 10.0
"""A call counts as hung after GRACE seconds plus FACTOR times its expected duration."""

_BACKWARD = 6
"""The cost of collecting statistics per token, in forward passes: an upper bound."""

_SILENCE = 2.0
"""Seconds of silence after which a worker is pinged before it gets a job."""

_STEP_SECONDS = 0.5

_PING = Call("ping", (), 0)


class WorkerPool:
    """Workers of a crew, as a `Pool`.

    Args:
        crew: Where they live.
        setup: What they are built from.
        workers: The most to hire; None for as many as there is room for, now and later.
        wait_seconds: How long to go on without any worker.
        start_seconds: How long a worker may take to start.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.
    """

    def __init__(
        self,
        crew: Crew,
        setup: Setup,
        workers: int | None,
        wait_seconds: float,
        start_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._crew, self._setup = crew, setup
        self._roster = Roster(crew, workers, wait_seconds, start_seconds, clock, say)
        self._jobs = Jobs(self._fitness_tokens)
        self._arrivals: deque[Arrival] = deque()
        self._pace = self._longest = 0.0

    # The interface for the search

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate; an idle worker gets it at once."""
        self._jobs.evaluate(candidate)
        self._roster.tick()
        self._assign()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None if none arrives in half a second.

        Raises:
            PoolError: If there is no worker and none comes, or no worker functions.
        """
        self._turn(0.0 if self._arrivals else _STEP_SECONDS)
        return self._arrivals.popleft() if self._arrivals else None

    def collect_statistics(
        self, subject: int, progress: Progress = unwatched
    ) -> Mapping[str, Tensor]:
        """Collect a model's statistics, by `X/layer`."""
        self._crew.watch(progress)
        tokens = _BACKWARD * self._setup.windows[subject]["calibration"].numel()
        (statistics,) = self._do([Call("collect_statistics", (subject,), tokens)])
        return cast(Mapping[str, Tensor], statistics)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Give a model's statistics to each worker, now or before its first evaluation."""
        shared = self._crew.share(tensors)
        self._roster.briefings.append(Call("use_statistics", (subject, shared), 0))
        self._assign()

    def use_scale(self, scale: Scale) -> None:
        """Give the scale of the fitness to each worker, now or before its first evaluation."""
        self._roster.briefings.append(Call("use_scale", (scale,), 0))
        self._assign()

    def seconds_of_tasks(self) -> list[float]:
        """Return how long the first stage of each task takes."""
        tokens = self._fitness_tokens
        calls = [Call("seconds_of", (task,), tokens) for task in range(len(self._setup.tasks))]
        return cast(list[float], self._do(calls))

    def probe_tensors(self, subject: int) -> Mapping[str, Tensor]:
        """Return the fingerprint's probe of a model; see `search.probe`."""
        (tensors,) = self._do([Call("probe_tensors", (subject,), 0)])
        return cast(Mapping[str, Tensor], tensors)

    def model_digest(self, subject: int) -> str:
        """Return a hash of those dense weights that get pruned, the same in all workers."""
        while self._roster.digests is None:
            self._turn(_STEP_SECONDS)
        return self._roster.digests[subject]

    def losses(
        self, requests: Sequence[LossRequest], done: Count = uncounted
    ) -> list[list[float] | None]:
        """Return each window's mean NLL in nats per token, for each request in order."""
        calls = []
        for request in requests:
            windows = self._setup.windows[self._setup.tasks[request.task].subject]
            arguments = (request.task, request.role, request.criterion)
            calls.append(Call("losses", arguments, 2 * windows[request.role].numel()))
        return cast(list[list[float] | None], self._do(calls, done))

    def zeros_and_overlap(
        self, requests: Sequence[MaskRequest], done: Count = uncounted
    ) -> list[ZerosAndOverlap]:
        """Return zeros and mask overlap by layer, for each request in order."""
        tokens = self._fitness_tokens
        calls = [Call("zeros_and_overlap", (r.task, r.one, r.other), tokens) for r in requests]
        return cast(list[ZerosAndOverlap], self._do(calls, done))

    @property
    def staff(self) -> Staff:
        """The current workers, and the faults so far."""
        return self._roster.staff

    @property
    def _fitness_tokens(self) -> int:
        tasks = self._setup.tasks
        return sum(self._setup.windows[task.subject]["fitness"].numel() for task in tasks)

    def _do(self, calls: Sequence[Call], done: Count = uncounted) -> list[object]:
        """Return the results of calls that the run cannot do without.

        Raises:
            ValueError: If a call had a wrong value; one line.
            CallError: If a call failed for a reason of its own.
            PoolError: As in `next_outcome`.
        """
        jobs = [self._jobs.call(call) for call in calls]
        counted = 0
        while counted < len(jobs):
            if ready := sum(job.done for job in jobs) - counted:
                counted += ready
                for _ in range(ready):
                    done()
            else:
                self._turn(_STEP_SECONDS)
        return [job.result for job in jobs]

    # One turn: workers are hired, get work, report, are dismissed

    def _turn(self, seconds: float) -> None:
        self._roster.tick()
        self._roster.hire()
        self._assign()
        events = self._crew.events(seconds)
        self._roster.tick()
        for event in events:
            if event.worker in self._roster.workers:  # it may have been dismissed meanwhile
                self._take(event)
        self._assign()  # before the driver turns to anything else
        for number, fault in self._roster.late():
            self._stumble(self._roster.dismiss(number, fault).job, fault)
        if not self._arrivals:
            self._roster.check()

    def _assign(self) -> None:
        roster = self._roster
        for number, worker in roster.waiting():
            if worker.briefed < len(roster.briefings):
                roster.brief(number)
            elif roster.now - worker.heard > _SILENCE:
                roster.give(number, _PING, GRACE)
            elif job := self._jobs.take():
                worker.job = job
                roster.give(number, job.call, self._allowed(job))

    def _allowed(self, job: Job) -> float:
        """Return the seconds after which a job counts as hung; they double at each timeout."""
        expected = max(self._pace * job.call.tokens, self._longest)
        return float((GRACE + FACTOR * expected) * 2 ** job.faults["late"])

    def _take(self, event: Event) -> None:
        self._roster.workers[event.worker].heard = self._roster.now
        if isinstance(event, Started):
            self._pace = max(self._pace, event.seconds / max(1, self._fitness_tokens))
            self._roster.welcome(event)
        elif isinstance(event, Ended):
            self._stumble(self._roster.part(event.worker, event.fault).job, event.fault)
        else:
            self._reply(event)

    def _reply(self, reply: Reply) -> None:
        """Process a worker's reply; dismiss the worker if it, not the job, is at fault."""
        worker, result = self._roster.workers[reply.worker], reply.result
        if isinstance(result, Fault) and (result.kind in MOST or not worker.job):
            self._stumble(self._roster.dismiss(reply.worker, result).job, result)
            return
        call, job = worker.call, worker.job
        worker.call = worker.job = None
        if job:
            job.timing = {**reply.timing, "worker": reply.worker}
            self._answer(job, result)
        elif call is not _PING:
            worker.briefed += 1
            self._roster.settle(worker)

    def _stumble(self, job: Job | None, fault: Fault) -> None:
        """Requeue the job of a failed worker, if there is one; end it after its last try."""
        if job and self._jobs.stumble(job, fault):
            if not job.can_fail:
                raise PoolError(f"no worker functions: {job.reason(fault)}")
            self._end(job, fault)

    def _answer(self, job: Job, result: object) -> None:
        self._jobs.answer(job)
        if isinstance(result, Fault):
            self._roster.faults[result.kind] += 1
        elif job.candidate:
            self._longest = max(self._longest, job.timing.get("seconds", 0.0))
        if not job.is_witness:
            self._end(job, result)

    def _end(self, job: Job, result: object) -> None:
        """Deliver the final result of a job: a value or a fault."""
        job.result, job.done = result, True
        fault = result if isinstance(result, Fault) else None
        if job.candidate:
            outcome = Outcome("failed", reason=job.reason(fault)) if fault else result
            trace = fault.trace if fault else ""
            arrival = Arrival(job.candidate.index, cast(Outcome, outcome), job.timing, trace)
            self._arrivals.append(arrival)
        elif fault and fault.kind == "refused":
            raise ValueError(f"a worker failed in {job.call.method}: {fault.reason}")
        elif fault:
            reason = job.reason(fault)
            raise CallError(f"a worker failed in {job.call.method}: {reason}", fault.trace)
