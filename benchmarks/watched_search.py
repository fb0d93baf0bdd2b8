"""`run_search.py` on Ray with a log of its evaluations: watched_search.py LOG SECONDS ARGUMENTS.

Each worker appends a line to the log when an evaluation begins and when it ends: `given` or `done`,
the candidate's index, the worker's process and a clock that all processes of a machine share. With
SECONDS above 0 a worker sleeps so long and makes the outcome up; every tenth candidate takes ten
times as long if SECONDS ends in `u`, for uneven.
"""

import hashlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from real_run import WATCH, watching

from search import launch
from search.fitness import Evaluator
from search.pool import on_ray, ray_process
from search.population import Candidate, Outcome

LOWEST, SPREAD = 3.0, 2.0
"""Range of the made-up fitness in nats per token, as on the embedded model."""

UNEVEN_SHARE, UNEVEN_FACTOR = 0.1, 10.0


class WatchedWorker(ray_process.Worker):
    """A worker whose evaluations are written down, and perhaps made up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        log, _, pace = os.environ[WATCH].rpartition(" ")
        _watch(Path(log), float(pace.removesuffix("u")), pace.endswith("u"))
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
    """Sleep, and return an outcome; both depend on the candidate alone."""
    long = uneven and _fraction(str(candidate.index)) < UNEVEN_SHARE
    time.sleep(seconds * (UNEVEN_FACTOR if long else 1))
    fitness = LOWEST + SPREAD * _fraction(str(candidate.criterion))
    rises = (fitness / LOWEST,)
    if candidate.stop_above is not None and fitness > candidate.stop_above:
        return Outcome("stopped", None, 512, f"rise {fitness:.4f}", rises=rises)
    return Outcome("evaluated", fitness, 8192, rises=rises)


def _fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on a text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16.0**12


def main() -> None:
    """Run the search, with workers that are watched from their start."""
    import watched_search  # this file: workers import the class from it

    import run_search

    os.environ |= watching(Path(sys.argv.pop(1)), sys.argv.pop(1))
    watched = partial(on_ray.ray_backend, actor=watched_search.WatchedWorker)
    launch.ray_backend = watched  # type: ignore[attr-defined]
    run_search.main()


if __name__ == "__main__":
    main()
