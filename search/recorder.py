"""The files of a run while it evolves: journal, checkpoint, best metric, status."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType

from search.evolution import Evolution
from search.experiment import Experiment
from search.journal import RunFolder, WriteError
from search.pool.pool import Arrival, Pool
from search.pool.requests import Timing
from search.population import Record
from search.scale import Scale, unit_of
from search.screen import Show
from search.status import RUNNING, BestSoFar, Status
from search.trackers import Tracker

OnRecord = Callable[[Record], object]
"""Called with each record once it is in the journal, in the order of breeding."""

_EVERY = 50
"""Candidates between two checkpoints."""

_SHOW_SECONDS, _STATUS_SECONDS = 0.25, 10.0
"""Seconds between two updates: on the screen, and of `status.json`."""


def ignore(record: Record) -> None:
    """Ignore a record."""


class Recorder:
    """Keeps a run's files up to date while it evolves; use as a context manager.

    On any exit it writes the checkpoint, the best metric and the status, if it can.
    """

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        evolution: Evolution,
        scale: Scale,
        pool: Pool,
        show: Show,
        trackers: Sequence[Tracker],
        on_record: OnRecord = ignore,
    ) -> None:
        self.folder, self.experiment, self.evolution = folder, experiment, evolution
        self.scale = scale
        self.pool, self.show_status, self.trackers = pool, show, trackers
        self.on_record = on_record
        self.outcomes: Counter[str] = Counter()
        self._timings: dict[int, Timing] = {}
        self._began, self._first = time.monotonic(), evolution.state.committed
        self._shown = self._written = 0.0

    def note(self, arrival: Arrival) -> None:
        """Keep an arrival's timing until its outcome is committed; write its trace, if any."""
        self._timings[arrival.index] = arrival.timing
        if arrival.trace:
            self.folder.write_failure(str(arrival.index), arrival.trace)

    def enter(self, records: list[Record]) -> None:
        """Append committed records to the journal and pass them on; checkpoint when one is due."""
        for record in records:
            self.folder.append(record, self._timings.pop(record.index, {}))
            self.outcomes[record.outcome.kind] += 1
        if records and (records[-1].index + 1) // _EVERY > records[0].index // _EVERY:
            self._checkpoint()
        for record in records:  # after all are in the journal: it may raise
            self.on_record(record)

    def show(self) -> None:
        """Show and save the run's status, each at its own interval."""
        now = time.monotonic()
        done = self.evolution.done
        if now - self._shown >= _SHOW_SECONDS or done:
            self._shown = now
            status = self._status(RUNNING)
            self.show_status(status)
            if now - self._written >= _STATUS_SECONDS or done:
                self._written = now
                self.folder.write_json("status.json", status.model_dump())
                for tracker in self.trackers:
                    tracker(status.candidates, status.values())

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, WriteError):
            return
        why = "evolved" if error is None else str(error) or "interrupted"
        try:
            self._checkpoint()
            self.folder.write_json("status.json", self._status(why).model_dump())
        except WriteError:
            if error is None:
                raise

    def _status(self, why: str) -> Status:
        state = self.evolution.state
        seconds = time.monotonic() - self._began
        per_hour = (state.committed - self._first) / seconds * 3600 if seconds else 0.0
        best, staff = state.best, self.pool.staff
        named, fitness = min(self.scale.named_fitness.items(), key=lambda item: item[1])
        return Status(
            state=why,
            candidates=state.committed,
            of=self.experiment.config.search.candidates,
            outcomes=dict(self.outcomes),
            per_hour=round(per_hour, 1),
            workers={"ready": staff.ready, "busy": staff.busy, "starting": staff.starting},
            faults=dict(staff.faults),
            trouble=staff.trouble,
            groups=dict(sorted(Counter(r.criterion.group for r in state.population).items())),
            best=BestSoFar(
                metric=best.criterion.text,
                group=best.criterion.group,
                fitness=best.rank[0],
                unit=unit_of(len(self.scale.cells)),
            )
            if best
            else None,
            seconds=round(seconds, 1),
            known={"dense": self.scale.dense_fitness, named: fitness},
        )

    def _checkpoint(self) -> None:
        self.folder.write_checkpoint(self.evolution.resumable, self.evolution.state)
        if self.evolution.state.best:
            self.folder.write_best(self.evolution.state.best, self.experiment.origin())
