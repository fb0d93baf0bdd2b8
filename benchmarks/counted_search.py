"""`run_search.py` on Ray that notes its evaluations: counted_search.py FILE ARGUMENTS.

The file gets a line for each evaluation that a worker is given, and for each whose outcome arrives:
`given INDEX` or `done INDEX`. It is appended to, so that it outlives the process.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import run_search
from search.pool import on_ray
from search.pool.crew import Call, Event, Fault, Reply
from search.population import Candidate

CALLS = Path(sys.argv.pop(1))


def _note(what: str, index: int) -> None:
    with CALLS.open("a", encoding="ascii") as file:
        file.write(f"{what} {index}\n")


class CountedCrew(on_ray.RayCrew):
    """Ray's crew, with a line for what it does."""

    def give(self, worker: int, call: Call) -> None:
        """Send a call to a worker."""
        super().give(worker, call)
        if call.method == "evaluate":
            (candidate,) = call.arguments
            assert isinstance(candidate, Candidate)
            self._given[worker] = candidate.index
            _note("given", candidate.index)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what came back."""
        events = super().events(seconds)
        for event in events:
            index = self._given.pop(event.worker, None)
            arrived = isinstance(event, Reply) and not isinstance(event.result, Fault)
            if index is not None and arrived:
                _note("done", index)
        return events

    @property
    def _given(self) -> dict[int, int]:
        given: dict[int, int] = self.__dict__.setdefault("_given_indices", {})
        return given


if __name__ == "__main__":
    # Where `search.launch` finds it when a pool is opened.
    on_ray.RayCrew = CountedCrew  # type: ignore[misc]
    run_search.main()
