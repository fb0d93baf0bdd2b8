"""`run_search.py` on Ray with a log of its evaluations: counted_search.py FILE ARGUMENTS.

It appends a line to the file for each evaluation given to a worker, `given INDEX`, and for each
outcome that arrives, `done INDEX`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import run_search
from search.pool import on_ray
from search.pool.crew import Call, Event, Fault, Reply
from search.population import Candidate

CALLS = Path(sys.argv.pop(1))


def _log(event: str, index: int) -> None:
    with CALLS.open("a", encoding="ascii") as file:
        file.write(f"{event} {index}\n")


class CountedCrew(on_ray.RayCrew):
    """A Ray crew that logs its evaluations."""

    def give(self, worker: int, call: Call) -> None:
        """Send a call to a worker."""
        super().give(worker, call)
        if call.method == "evaluate":
            (candidate,) = call.arguments
            assert isinstance(candidate, Candidate)
            self._given[worker] = candidate.index
            _log("given", candidate.index)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the replies and faults."""
        events = super().events(seconds)
        for event in events:
            index = self._given.pop(event.worker, None)
            arrived = isinstance(event, Reply) and not isinstance(event.result, Fault)
            if index is not None and arrived:
                _log("done", index)
        return events

    @property
    def _given(self) -> dict[int, int]:
        given: dict[int, int] = self.__dict__.setdefault("_given_indices", {})
        return given


if __name__ == "__main__":
    # `search.launch` looks the class up here when it opens a pool.
    on_ray.RayCrew = CountedCrew  # type: ignore[misc]
    run_search.main()
