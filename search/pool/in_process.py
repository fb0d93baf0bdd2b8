"""The backend whose one worker is this process: for tests and for `ray.workers: 0`."""

import gc
import time
from collections.abc import Sequence
from functools import partial

from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.worker import Job, Shared, Worker
from prunevolve.search.pool.workers import Event


def value_of(shared: object) -> object:
    """Return the value that was shared."""
    assert callable(shared)
    return shared()


class InProcess:
    """A worker that does its jobs inside `events`; once it is stopped, the next loads anew."""

    def __init__(self, experiment: Experiment) -> None:
        self._build = partial(Evaluator, experiment)
        self._number = 0
        self._worker: Worker | None = None
        self._given: tuple[Job, Shared] | None = None

    def room(self) -> int:
        """Return 1."""
        return 1

    def start(self) -> int:
        """Start the worker."""
        self._number += 1
        self._worker = Worker(self._build, value_of)
        return self._number

    def stop(self, worker: int) -> None:
        """Release the models."""
        self._worker = self._given = None
        gc.collect()  # before they are loaded again: memory may not hold two copies

    def give(self, worker: int, job: Job, shared: Shared) -> None:
        """Keep a job for `events` to do."""
        self._given = job, shared

    def events(self, seconds: float) -> Sequence[Event]:
        """Do the job that was given."""
        if not self._given or not self._worker:
            time.sleep(min(seconds, 0.05))
            return []
        given, self._given = self._given, None
        return [(self._number, *self._worker.do(*given))]

    def share(self, value: object) -> object:
        """Return a function that returns the value: equal only to itself."""
        return lambda: value
