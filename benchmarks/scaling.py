"""How busy a driver keeps workers that only sleep, 16 to 1,024 of them.

The search is the real one on the embedded model, with fingerprints and journal. In its
workers' place stand entries in a list, each busy for some seconds with an outcome that is made up.
A driver can feed as many workers as its work for an evaluation fits into the time of one. If the
lag is too small for the longest evaluation, workers wait for its commit.
"""

import heapq
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer
from rich.progress import track
from tables import conditions, show, write_json

from prunevolve import Record, evolve, read_config
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.worker import Event, InProcess, Job, Loaded, Shared, Worker
from prunevolve.search.records import Candidate, Outcome, Timing

COLUMNS = ("busy", "driver_ms", "feeds", "candidates")
LAG = 16  # for each worker, as docs/CLUSTER.md says
LOWEST, HIGHEST = 0.9, 2.9  # made-up fitness
LONG_FRACTION, LONG_FACTOR = 0.1, 10.0  # of evaluations in an uneven mix; how much longer they are


@dataclass(frozen=True)
class Case:
    """A number of sleeping workers and their work."""

    workers: int
    seconds: float  # of an evaluation; if uneven, of a short one
    uneven: bool  # whether one evaluation in ten takes ten times as long

    def __str__(self) -> str:
        return f"{self.workers} x {self.seconds:g} s, {'uneven' if self.uneven else 'even'}"

    @property
    def longest(self) -> float:
        """Seconds of the longest evaluation."""
        return self.seconds * (LONG_FACTOR if self.uneven else 1)

    def duration(self, candidate: Candidate) -> float:
        """Return how long an evaluation takes; it depends on the candidate alone."""
        is_long = random.Random(candidate.index).random() < LONG_FRACTION
        return self.longest if is_long else self.seconds


SIZES = ((16, 2.0), (64, 2.0), (256, 5.0), (1024, 20.0))
CASES = [Case(*size, uneven) for size in SIZES for uneven in (False, True)]


def main(
    seconds: Annotated[float, typer.Option(help="Seconds of each case.")] = 45.0,
    only: Annotated[str, typer.Option(help="Run only cases whose name contains this.")] = "",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    cases = [case for case in CASES if only in str(case)]
    figures: dict[str, dict[str, float]] = {}
    for case in track(cases, "searching", transient=True):
        with tempfile.TemporaryDirectory() as folder:
            figures[str(case)] = _measure(case, Path(folder), seconds)
    title = f"workers that sleep, lag {LAG} for each; bar: 95% busy"
    show(title, ["", *COLUMNS], ([name, *row.values()] for name, row in figures.items()))
    write_json(json, {**conditions("float32"), "cases": figures})


class Sleepers(InProcess):
    """A backend of workers that sleep; this process does what is not an evaluation."""

    def __init__(self, experiment: Experiment, case: Case) -> None:
        super().__init__(experiment)
        self._case = case
        self._ready: list[Event] = []
        self._loaded: tuple[object, Timing] = (None, {})
        self._asleep: list[tuple[float, int, Candidate]] = []
        # When each evaluation began and will end, on the monotonic clock.
        self.spans: list[tuple[float, float]] = []

    def start(self, worker: int) -> None:
        """Start a worker; all are one evaluator."""
        self._worker = self._worker or Worker(self._build)

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        """Note when an evaluation will end; do anything else at once, and load only once."""
        assert self._worker
        if job.method == "load" and worker > 1:
            self._ready.append((worker, *self._loaded))
        elif job.method != "evaluating":
            result, timing = self._worker.do(job, shared)
            if isinstance(result, Loaded):  # from whose seconds deadlines follow
                result = replace(result, seconds=self._case.longest)
                self._loaded = result, timing
            self._ready.append((worker, result, timing))
        else:
            now = time.monotonic()
            until = now + self._case.duration(job.candidate)
            self.spans.append((now, until))
            heapq.heappush(self._asleep, (until, worker, job.candidate))

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what has ended by now, waiting at most so long for the first to end."""
        if not self._ready and self._asleep:
            time.sleep(max(0.0, min(seconds, self._asleep[0][0] - time.monotonic())))
        while self._asleep and self._asleep[0][0] <= time.monotonic():
            _, worker, candidate = heapq.heappop(self._asleep)
            self._ready.append((worker, _made_up(candidate), {}))
        events, self._ready = self._ready, []
        return events


def _made_up(candidate: Candidate) -> Outcome:
    """Return an outcome that depends on the candidate alone."""
    fitness = random.Random(str(candidate.criterion)).uniform(LOWEST, HIGHEST)
    if candidate.limits and fitness > candidate.limits.entry:
        return Outcome("stopped", None, 512, f"rise {fitness:.4f}")
    return Outcome("evaluated", fitness, 8192)


class Enough(Exception):
    """The measurement is over."""


def _measure(case: Case, out: Path, seconds: float) -> dict[str, float]:
    """Search, and measure for some seconds once children have parents."""
    backends: list[Sleepers] = []
    marks: list[tuple[float, float, int]] = []  # time, seconds of processor, candidates
    lag = LAG * case.workers

    @contextmanager
    def sleeping(experiment: Experiment, console: object) -> Iterator[Sleepers]:
        backends.append(Sleepers(experiment, case))
        yield backends[0]

    def watch(record: Record) -> None:
        if record.index > lag and (not marks or time.monotonic() > marks[0][0] + seconds):
            marks.append((time.monotonic(), time.process_time(), record.index))
            if len(marks) > 1:
                raise Enough

    settings = [
        *(f"search.lag={lag}", "search.candidates=1000000"),
        # An address, since as many workers would not fit this machine.
        *(f"ray.workers={case.workers}", "ray.address=auto"),
    ]
    with mock.patch("prunevolve.search.run.backend_of", sleeping), suppress(Enough):
        evolve(read_config("embedded", settings), out, on_record=watch)
    (began, cpu, first), (ended, cpu_after, last) = marks
    inside = [(max(a, began), min(b, ended)) for a, b in backends[0].spans]
    busy = [end - start for start, end in inside if start < end]
    mean = case.seconds * (1 + case.uneven * LONG_FRACTION * (LONG_FACTOR - 1))
    busy_fraction = sum(busy) / (case.workers * (ended - began))
    cpu, candidates = cpu_after - cpu, last - first
    values = (busy_fraction, 1000 * cpu / candidates, mean * len(busy) / cpu, candidates)
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    typer.run(main)
