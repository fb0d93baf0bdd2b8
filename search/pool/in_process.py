"""A crew whose one worker is this process itself: for tests and for `ray.workers: 0`."""

import gc
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from pruning.progress import Progress
from search.fitness import Evaluator, Setup
from search.pool.crew import Call, Ended, Event, Fault, Reply, Started, attempt, perform
from search.resident import unwatched


class InProcessCrew:
    """Does its work inside `events`; after a dismissal, the models are loaded again."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker = 0
        self._hired = False
        self._evaluator: Evaluator | None = None
        self._call: Call | None = None
        self._progress: Progress = unwatched

    def room(self) -> int:
        """Return how many more workers could start now: one in total."""
        return 0 if self._hired else 1

    def hire(self) -> int:
        """Begin starting the worker; `events` loads its models."""
        self._worker += 1
        self._hired = True
        return self._worker

    def give(self, worker: int, call: Call) -> None:
        """Keep a call for `events` to do."""
        self._call = call

    def dismiss(self, worker: int) -> None:
        """Release the models."""
        self._hired, self._evaluator, self._call = False, None, None
        gc.collect()  # before they are loaded again: memory may not hold two copies

    def events(self, seconds: float) -> Sequence[Event]:
        """Start the worker, or do the call that it has been given."""
        if self._hired and self._evaluator is None:
            return [self._start()]
        if self._call is None or self._evaluator is None:
            time.sleep(min(seconds, 0.05))
            return []
        call, self._call = self._call, None
        self._evaluator.progress = self._progress
        result, timing = perform(self._evaluator, call.method, call.arguments)
        return [Reply(self._worker, result, timing)]

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Return the tensors themselves."""
        return tensors

    def watch(self, progress: Progress) -> None:
        """Report the progress of collecting statistics from now on."""
        self._progress = progress

    def wish(self, workers: int) -> None:
        """There is nothing to grow."""

    def _start(self) -> Event:
        evaluator = attempt(lambda: Evaluator(self._setup))
        if isinstance(evaluator, Fault):
            self.dismiss(self._worker)
            return Ended(self._worker, evaluator)
        self._evaluator = evaluator
        return Started(self._worker, evaluator.digests, evaluator.seconds)
