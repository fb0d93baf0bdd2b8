"""`run_search.py` with a log of its evaluations: watched_search.py LOG PACE ARGUMENTS.

Each worker appends a line to the log when an evaluation begins and when it ends: `given` or `done`,
the candidate's index, the worker and a clock that all processes of a machine share. PACE is 0 for
real evaluations on Ray, or the seconds that a worker sleeps before it makes the outcome up. After
the seconds, `u` for uneven: every tenth candidate takes ten times as long; and `d` for dummies:
instead of Ray's processes, entries in a list of the driver, so that there can be a thousand.
"""

import hashlib
import heapq
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from real_run import WATCH, watching

from prunevolve.configs.schema import Ray
from prunevolve.search import launch
from prunevolve.search.fitness import Evaluator, Setup
from prunevolve.search.pool import on_ray, ray_process
from prunevolve.search.pool.requests import (
    Backend,
    Evaluate,
    Event,
    Reply,
    Request,
    Started,
    perform,
)
from prunevolve.search.population import Candidate, Outcome

LOWEST, SPREAD = 3.0, 2.0
"""Range of the made-up fitness in nats per token, as on the embedded model."""

UNEVEN_SHARE, UNEVEN_FACTOR = 0.1, 10.0


class WatchedWorker(ray_process.Worker):
    """A worker whose evaluations are written down, and perhaps made up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        log, _, pace = os.environ[WATCH].rpartition(" ")
        _watch(Path(log), float(pace.rstrip("u")), pace.endswith("u"))
        super().__init__(*arguments, **options)


def _watch(log: Path, seconds: float, uneven: bool) -> None:
    """Make this process's evaluator write its evaluations down, and perhaps sleep instead."""
    evaluate = Evaluator.evaluate

    def write(event: str, candidate: Candidate) -> None:
        with log.open("a", encoding="ascii") as file:
            file.write(f"{event} {candidate.index} {os.getpid()} {time.monotonic()}\n")

    def watched(self: Evaluator, candidate: Candidate) -> Outcome:
        write("given", candidate)
        outcome = _sleep(candidate, seconds, uneven) if seconds else evaluate(self, candidate)
        write("done", candidate)
        return outcome

    Evaluator.evaluate = watched  # type: ignore[method-assign]


def _sleep(candidate: Candidate, seconds: float, uneven: bool) -> Outcome:
    time.sleep(_duration(candidate, seconds, uneven))
    return _made_up(candidate)


def _duration(candidate: Candidate, seconds: float, uneven: bool) -> float:
    """Return how long an evaluation takes; it depends on the candidate alone."""
    long = uneven and _fraction(str(candidate.index)) < UNEVEN_SHARE
    return seconds * (UNEVEN_FACTOR if long else 1)


def _made_up(candidate: Candidate) -> Outcome:
    """Return an outcome that depends on the candidate alone."""
    fitness = LOWEST + SPREAD * _fraction(str(candidate.criterion))
    rises = (fitness / LOWEST,)
    if candidate.stop_above is not None and fitness > candidate.stop_above:
        return Outcome("stopped", None, 512, f"rise {fitness:.4f}", rises=rises)
    return Outcome("evaluated", fitness, 8192, rises=rises)


class Dummies:
    """A backend of workers that are no processes; this one does what is not an evaluation."""

    def __init__(self, setup: Setup, log: Path, pace: str) -> None:
        self._evaluator = Evaluator(setup)
        self._log = log.open("w", encoding="ascii", buffering=1)
        self._seconds, self._uneven = float(pace.rstrip("ud")), "u" in pace
        self._hired = 0
        self._ready: list[Event] = []
        self._asleep: list[tuple[float, int, Candidate]] = []

    def hire(self, most: int) -> Sequence[int]:
        """Hire all at once."""
        numbers = range(self._hired, self._hired + most)
        self._hired += most
        self._ready += [Started(n, self._evaluator.digests, self._seconds) for n in numbers]
        return numbers

    def give(self, worker: int, request: Request[object]) -> None:
        """Note when an evaluation will end; do anything else at once."""
        if not isinstance(request, Evaluate):
            self._ready.append(Reply(worker, *perform(self._evaluator, request)))
            return
        candidate, now = request.candidate, time.monotonic()
        self._log.write(f"given {candidate.index} {worker} {now}\n")
        until = now + _duration(candidate, self._seconds, self._uneven)
        heapq.heappush(self._asleep, (until, worker, candidate))

    def dismiss(self, worker: int) -> None:
        """Nobody is dismissed."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what has ended by now, waiting at most so long for the first to end."""
        if not self._ready and self._asleep:
            time.sleep(max(0.0, min(seconds, self._asleep[0][0] - time.monotonic())))
        while self._asleep and self._asleep[0][0] <= time.monotonic():
            ended, worker, candidate = heapq.heappop(self._asleep)
            self._log.write(f"done {candidate.index} {worker} {ended}\n")
            self._ready.append(Reply(worker, _made_up(candidate), {"seconds": self._seconds}))
        events, self._ready = self._ready, []
        return events

    def share(self, request: Request[None]) -> Request[None]:
        """Return the request itself."""
        return request


@contextmanager
def dummies(setup: Setup, ray: Ray, log: Path, pace: str) -> Iterator[Backend]:
    """Take the place of `search.pool.on_ray.ray_backend`."""
    yield Dummies(setup, log, pace)


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16.0**12


def main() -> None:
    """Run the search, with workers that are watched from their start."""
    import watched_search  # this file: workers import the class from it

    from prunevolve import run_search

    log, pace = Path(sys.argv.pop(1)), sys.argv.pop(1)
    os.environ |= watching(log, pace)
    watched = partial(on_ray.ray_backend, actor=watched_search.WatchedWorker)
    backend = partial(dummies, log=log, pace=pace) if pace.endswith("d") else watched
    launch.ray_backend = backend  # type: ignore[attr-defined, assignment]
    run_search.main()


if __name__ == "__main__":
    main()
