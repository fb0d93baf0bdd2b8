"""The files and the screen of a run while it evolves, and what TensorBoard shows, if wanted."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from rich.console import Console

from prunevolve.pruning.progress import Show, shown_progress
from prunevolve.search.evolution import Evolution
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.pool import Arrival, Pool
from prunevolve.search.pool.requests import Timing
from prunevolve.search.population import Record
from prunevolve.search.prepare import read_scale
from prunevolve.search.run_folder import RunFolder, WriteError
from prunevolve.search.status import RUNNING, BestSoFar, Status

OnRecord = Callable[[Record], object]
"""Called with each record once it is in the journal, in the order of breeding."""

Tracker = Callable[[int, Mapping[str, float]], None]
"""Takes the number of candidates so far, and values by name, such as `fitness/best`."""

_EVERY = 50
"""Candidates between two checkpoints."""

_SHOW_SECONDS, _STATUS_SECONDS = 0.25, 10.0
"""Seconds between two updates: on the screen, and of `status.json`."""


def ignore(record: Record) -> None:
    """Ignore a record."""


class Recorder:
    """Keeps a run's files up to date while it evolves; see `recording`.

    Its `outcomes` count the journal's records by kind.
    """

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        evolution: Evolution,
        pool: Pool,
        show: Show,
        track: Tracker | None,
        on_record: OnRecord,
    ) -> None:
        scale = read_scale(folder)
        assert scale, "prepare comes before the first candidate"
        self._folder, self._experiment, self._evolution = folder, experiment, evolution
        self._scale, self._pool = scale, pool
        self._show, self._track, self._on_record = show, track, on_record
        self.outcomes: Counter[str] = Counter()
        self._timings: dict[int, Timing] = {}
        self._began, self._first = time.monotonic(), evolution.state.committed
        self._shown = self._written = 0.0

    def note(self, arrival: Arrival) -> None:
        """Keep an arrival's timing until its outcome is committed; write its trace, if any."""
        self._timings[arrival.index] = arrival.timing
        if arrival.trace:
            self._folder.write_failure(str(arrival.index), arrival.trace)

    def enter(self, records: list[Record]) -> None:
        """Append committed records to the journal and pass them on; checkpoint when one is due."""
        for record in records:
            self._folder.append(record, self._timings.pop(record.index, {}))
            self.outcomes[record.outcome.kind] += 1
        if records and (records[-1].index + 1) // _EVERY > records[0].index // _EVERY:
            self._checkpoint()
        for record in records:  # after all are in the journal: it may raise
            self._on_record(record)

    def show(self) -> None:
        """Show and save the run's status, each at its own interval."""
        now = time.monotonic()
        done = self._evolution.done
        if now - self._shown >= _SHOW_SECONDS or done:
            self._shown = now
            status = self._status(RUNNING)
            self._show("candidates", status.candidates, status.of, status.lines())
            if now - self._written >= _STATUS_SECONDS or done:
                self._written = now
                self._folder.write_json("status.json", status.model_dump())
                if self._track:
                    self._track(status.candidates, status.values())

    def close(self, why: str) -> None:
        """Write the checkpoint, the best metric, and the status with the reason of the end."""
        self._checkpoint()
        self._folder.write_json("status.json", self._status(why).model_dump())

    def _status(self, why: str) -> Status:
        state, scale, staff = self._evolution.state, self._scale, self._pool.staff
        seconds = time.monotonic() - self._began
        per_hour = (state.committed - self._first) / seconds * 3600 if seconds else 0.0
        named, fitness = min(scale.named_fitness.items(), key=lambda item: item[1])
        best = None
        if record := state.best:
            criterion, unit = record.criterion, "x best named"
            best = BestSoFar(
                metric=criterion.text, group=criterion.group, fitness=record.rank[0], unit=unit
            )
        return Status(
            state=why,
            candidates=state.committed,
            of=self._experiment.config.search.candidates,
            outcomes=dict(self.outcomes),
            per_hour=round(per_hour, 1),
            workers={"ready": staff.ready, "busy": staff.busy, "starting": staff.starting},
            faults=dict(staff.faults),
            trouble=staff.trouble,
            best=best,
            known={"dense": scale.dense_fitness, named: fitness},
        )

    def _checkpoint(self) -> None:
        self._folder.write_checkpoint(self._evolution.resumable, self._evolution.state)
        if self._evolution.state.best:
            self._folder.write_best(self._evolution.state.best, self._experiment.origin())


@contextmanager
def recording(
    folder: RunFolder,
    experiment: Experiment,
    evolution: Evolution,
    pool: Pool,
    console: Console,
    on_record: OnRecord,
) -> Iterator[Recorder]:
    """Yield a recorder; at the end, whatever it is, write the checkpoint and status if possible."""
    wanted = experiment.config.tensorboard
    with (
        shown_progress(console) as show,
        tensorboard(folder.path) if wanted else nullcontext() as track,
    ):
        recorder = Recorder(folder, experiment, evolution, pool, show, track, on_record)
        try:
            yield recorder
        except WriteError:
            raise
        except BaseException as error:
            with suppress(WriteError):
                recorder.close(str(error) or "interrupted")
            raise
        recorder.close("evolved")


@contextmanager
def tensorboard(folder: Path) -> Iterator[Tracker]:
    """Write event files into a run's folder `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    def track(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    with SummaryWriter(folder / "tensorboard") as writer:
        yield track
