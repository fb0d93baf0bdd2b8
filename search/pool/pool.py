"""The pool: what a search asks of its workers, wherever they are, and whom a fault is blamed on.

A job that met a worker's fault is given to another worker. Before a candidate's last try a baseline
is evaluated: if that works, the workers do, and the candidate is `failed` if it fails once more. A
candidate that raised an exception is `failed` as soon as another is evaluated; after several in a
row, or if there is nothing else to do, the baseline decides. If the baseline fails, or several
candidates in a row come to their last try, the pool itself is broken and no candidate is blamed.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import cast

from rich.console import Console
from torch import Tensor

from prunevolve.command_line import Resumable, check_interrupt
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.progress import shown_progress
from prunevolve.search.descent import Step
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.worker import Fault, Job
from prunevolve.search.pool.workers import MAX_TRIES, Backend, Workers
from prunevolve.search.records import Candidate, Losses, Outcome, Record, Wanted
from prunevolve.search.scale import Scale

MOST_SUSPECTS = 5
"""Candidates in a row, with none evaluated in between: so many at their last try end the run, and
so many exceptions have a baseline evaluated."""

_BASELINE = Candidate(-1, named_metric("wanda"))
_BACKWARD = 6  # most that collecting statistics costs per token, in forward passes
_STEP_SECONDS = 0.5


class CallError(RuntimeError):
    """A job that the run cannot do without failed for a reason of its own, not a worker's."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace  # in the worker


@dataclass(eq=False)
class Pool:
    """Workers that hold the models of a search and evaluate its candidates."""

    backend: Backend
    experiment: Experiment
    console: Console
    clock: Callable[[], float] = time.monotonic
    # Losses that are not measured again; what is called with others as soon as they are.
    measured: dict[Wanted, Losses] = field(default_factory=dict)
    keep: Callable[[Wanted, Losses], object] = lambda wanted, losses: None

    def __post_init__(self) -> None:
        self.scale: Scale  # what candidates are measured on, from `use_scale` on
        self._numbers = count()
        self._waiting: list[Job] = []
        self._suspects: list[Job] = []
        self._raised: list[tuple[Job, Fault]] = []
        self._in_a_row = 0
        self._is_judged = False  # whether a baseline waits or is being evaluated
        self._decided: deque[Job] = deque()  # candidates whose outcomes nobody has taken yet
        say = partial(self.console.print, soft_wrap=True)
        settings = self.experiment.config.ray
        self.workers = Workers(self.backend, self._next, settings, self.clock, say)

    def start(self) -> None:
        """Wait for the first worker; raise Resumable if none comes or functions."""
        while not self.workers.loaded:
            self._turn()

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate without waiting; an idle worker gets it at once."""
        self._add("evaluating", candidate, cost=float(len(self.experiment.tasks)))
        self.workers.assign()

    def next_done(self) -> Job | None:
        """Return a candidate's job with its outcome, or None if none is done in half a second."""
        self._turn(0.0 if self._decided else _STEP_SECONDS)
        return self._decided.popleft() if self._decided else None

    def losses(self, stage: str, wanted: Sequence[Wanted]) -> Mapping[Wanted, Losses]:
        """Return all losses so far, once they have what is wanted; `stage` names the progress.

        Raises ValueError, in one line, if a value is wrong, CallError if a job failed for another
        reason of its own, and Resumable as `start`.
        """
        every = dict.fromkeys(wanted)
        for task, role, criterion in every:
            if (task, role, criterion) not in self.measured:
                cost = self._cost(self.experiment.subject_of[task], role)
                self._add("losses", task, role, criterion, cost=cost)
        self._wait(stage, lambda: (len(every.keys() & self.measured.keys()), len(every)))
        return self.measured

    def shorter(self, stage: str, record: Record) -> list[tuple[Criterion, Metric]]:
        """Return what `Evaluator.shortening` makes of a candidate; raises as `losses` does."""
        job = self._add("shortening", record.criterion, record.index)

        def how_far() -> tuple[int, int]:
            step = job.step or Step(0, 1)
            # A last step is the answer, which may come early.
            return step.done if job.result is None else step.total + 1, step.total + 1

        self._wait(stage, how_far)
        return cast("list[tuple[Criterion, Metric]]", job.result)

    def _wait(self, stage: str, how_far: Callable[[], tuple[int, int]]) -> None:
        """Let the workers work until all is done, and show it."""
        with shown_progress(self.console) as show:
            while (far := how_far())[0] < far[1]:
                show(stage, *far)
                self._turn()
            show(stage, *far)

    def tensors(
        self, method: str, subjects: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield what a method of `Evaluator` makes of models, each once it is there; raises as
        `losses` does.

        It is `collect_statistics`, or `probe_tensors` once these are used.
        """
        costs = {n: _BACKWARD * self._cost(n, "calibration") for n in subjects}
        jobs = {n: self._add(method, n, cost=cost) for n, cost in costs.items()}
        if not jobs:
            return
        with shown_progress(self.console) as show:
            while jobs:
                self._turn()
                for subject in [x for x, job in jobs.items() if job.result is not None]:
                    yield subject, cast("dict[str, Tensor]", jobs.pop(subject).result)
                show(method.replace("_", " "), len(subjects) - len(jobs), len(subjects))

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Let all workers use a model's statistics from now on."""
        self.workers.shared[subject] = self.backend.share(tensors)

    def use_scale(self, scale: Scale) -> None:
        """Let all workers measure candidates on this scale from now on."""
        self.scale = scale
        self.workers.shared["scale"] = self.backend.share(scale)

    def _cost(self, subject: int, role: str) -> float:
        """Return how long a text takes, in times of all fitness texts on the dense models."""
        subjects = self.experiment.subjects
        all_tokens = sum(each.tokens["fitness"].numel() for each in subjects)
        return subjects[subject].tokens[role].numel() / all_tokens

    def _turn(self, seconds: float = _STEP_SECONDS) -> None:
        check_interrupt()
        for job, result in self.workers.turn(seconds):
            if isinstance(result, Fault) and result.kind in MAX_TRIES:
                self._retry(job, result)
            else:
                self._answer(job, result)

    # The queue

    def _add(self, method: str, *arguments: object, cost: float = 0.0) -> Job:
        """Let a new job wait behind all others."""
        job = Job(method, arguments, cost, next(self._numbers))
        self._waiting.append(job)
        return job

    def _insert(self, job: Job) -> None:
        """Let a job wait ahead of all that came later."""
        insort(self._waiting, job, key=lambda waiting: waiting.number)

    def _next(self) -> Job | None:
        """Take the first job, if there is one."""
        if not self._waiting and self._raised:
            self._judge()
        return self._waiting.pop(0) if self._waiting else None

    def _retry(self, job: Job, fault: Fault) -> None:
        """Take back a job whose worker had a fault, ahead of all later ones; fail it at its end."""
        job.faults[fault.kind] += 1
        left = MAX_TRIES[fault.kind] - job.faults[fault.kind]
        if left > 1 or (left == 1 and not job.is_candidate):
            self._insert(job)
        elif left == 1:
            self._in_a_row += 1
            if self._in_a_row >= MOST_SUSPECTS:
                row = f"{MOST_SUSPECTS} candidates in a row, the last of them"
                raise Resumable(f"no worker functions: {row}: {job.reason(fault)}")
            self._judge()
            self._suspects.append(job)
        else:
            self._fail(job, fault)

    def _answer(self, job: Job, result: object) -> None:
        """Take a worker's answer to a job, a value or a fault of the job's own."""
        if isinstance(result, Fault):
            if not job.is_candidate:
                self._fail(job, result)
            self._raised.append((job, result))
            if len(self._raised) >= MOST_SUSPECTS:
                self._judge()
            return
        if job.is_candidate:
            self._in_a_row = 0
        while self._raised:  # this worked, so they failed by themselves
            self._fail(*self._raised.pop(0))
        job.result = result
        if job.is_candidate:
            self._decided.append(job)
        elif job.method == "evaluating":
            self._is_judged = False
            while self._suspects:
                self._insert(self._suspects.pop())
        elif job.method == "losses":
            wanted, losses = cast("Wanted", job.arguments), cast("Losses", result)
            self.measured[wanted] = losses
            self.keep(wanted, losses)

    def _judge(self) -> None:
        """Let a baseline be evaluated, unless one is: it shows who is to blame."""
        if not self._is_judged:
            self._is_judged = True
            self._insert(Job("evaluating", (_BASELINE,), float(len(self.experiment.tasks)), -1))

    def _fail(self, job: Job, fault: Fault) -> None:
        """Let a candidate be `failed`, and the run end if the job is none."""
        if job.is_candidate:
            job.result, job.trace = Outcome("failed", reason=job.reason(fault)), fault.trace
            self._decided.append(job)
            return
        if fault.kind in MAX_TRIES:
            raise Resumable(f"no worker functions: {job.reason(fault)}")
        if job.method == "evaluating":
            raise Resumable(f"no worker functions: a baseline fails, too: {fault.line}")
        failed = f"a worker failed in {job.method}"
        if fault.kind == "refused":
            raise ValueError(f"{failed}: {fault.reason}")
        raise CallError(f"{failed}: {job.reason(fault)}", fault.trace)
