"""The backend whose one worker is this process itself: for tests and for `ray.workers: 0`."""

import gc
import time
from collections.abc import Sequence
from typing import Any

from search.fitness import Evaluator, Setup
from search.pool.requests import (
    Ended,
    Event,
    Fault,
    Reply,
    Request,
    Started,
    attempt,
    perform,
)


class InProcessBackend:
    """Does its work inside `events`; after a dismissal, the models are loaded again."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker = 0
        self._hired = False
        self._evaluator: Evaluator | None = None
        self._request: Request[Any] | None = None

    def hire(self, most: int) -> Sequence[int]:
        """Begin to start the worker, if it is not there yet; `events` loads its models."""
        if self._hired or most < 1:
            return []
        self._worker += 1
        self._hired = True
        return [self._worker]

    def give(self, worker: int, request: Request[Any]) -> None:
        """Keep a request for `events` to do."""
        self._request = request

    def dismiss(self, worker: int) -> None:
        """Release the models."""
        self._hired, self._evaluator, self._request = False, None, None
        gc.collect()  # before they are loaded again: memory may not hold two copies

    def events(self, seconds: float) -> Sequence[Event]:
        """Start the worker, or do the request that it has been given."""
        if self._hired and self._evaluator is None:
            return [self._start()]
        if self._request is None or self._evaluator is None:
            time.sleep(min(seconds, 0.05))
            return []
        request, self._request = self._request, None
        return [Reply(self._worker, *perform(self._evaluator, request))]

    def share(self, request: Request[None]) -> Request[None]:
        """Return the request itself."""
        return request

    def _start(self) -> Event:
        evaluator = attempt(lambda: Evaluator(self._setup))
        if isinstance(evaluator, Fault):
            self.dismiss(self._worker)
            return Ended(self._worker, evaluator)
        self._evaluator = evaluator
        return Started(self._worker, evaluator.digests, evaluator.seconds)
