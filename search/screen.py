"""The progress of a run: its status, on the screen and in `status.json`, and its steps.

On a terminal it is a live table or a spinner, elsewhere plain lines.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from prunevolve.search.checkpoint import read_state
from prunevolve.search.journal import RunFolder
from prunevolve.search.population import OUTCOMES, State

RUNNING, FINISHED = "running", "finished"

_FIRST_SECONDS, _PLAIN_SECONDS = 2.0, 10.0
"""Seconds before the first plain line about a running step, and between two plain lines."""

_WIDE, _MIDDLE = 76, 50
"""Terminal widths below which a table omits the group, and also the metric."""


class BestSoFar(BaseModel):
    """The fittest metric so far."""

    metric: str
    group: str
    fitness: float
    unit: str


class Status(BaseModel):
    """The status of a run at one moment.

    Attributes:
        state: `running`, `finished`, or why it ended.
        written: Time of writing, UTC, ISO 8601.
        candidates: Number of committed candidates.
        of: Number of candidates in total.
        outcomes: Number of committed candidates, by kind of outcome.
        per_hour: Candidates per hour since this process began; 0 if not known yet.
        workers: How many are ready, busy (of the ready ones) and starting.
        faults: Number of faults of workers and calls since this process began, by kind.
        trouble: The latest fault, in one line.
        groups: Members of the population by comparison group.
        seconds: Seconds since this process began to evolve.
        known: Fitness of the dense model and of the best named metric.
    """

    model_config = ConfigDict(frozen=True)

    state: str
    written: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    candidates: int
    of: int
    outcomes: dict[str, int]
    per_hour: float
    workers: dict[str, int]
    faults: dict[str, int]
    trouble: str
    groups: dict[str, int]
    best: BestSoFar | None
    seconds: float
    known: dict[str, float]

    def values(self) -> dict[str, float]:
        """Return the values for trackers, by name."""
        counts = {"outcomes": self.outcomes, "faults": self.faults, "workers": self.workers}
        values = {f"{of}/{name}": float(n) for of in counts for name, n in counts[of].items()}
        values["candidates_per_hour"] = self.per_hour
        if self.best:
            values["fitness/best"] = self.best.fitness
        return values

    @property
    def unit(self) -> str:
        """The unit of fitness."""
        return self.best.unit if self.best else "fitness"

    def fitness_rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, fitness, metric and group of the known metrics and of the best so far."""
        rows = [(name, f"{value:.4f}", "", "") for name, value in self.known.items()]
        best = self.best
        if not best:
            return [*rows, ("best", "none yet", "", "")]
        return [*rows, ("best", f"{best.fitness:.4f}", best.metric, best.group)]

    def rows(self) -> list[tuple[str, str]]:
        """Return the course of the search, as pairs of a name and a text."""
        left = (self.of - self.candidates) / self.per_hour * 3600 if self.per_hour else None
        rows = [
            ("candidate", f"{self.candidates}/{self.of}"),
            ("elapsed", duration(self.seconds)),
            ("left", "-" if left is None else duration(left)),
            ("pace", f"{self.per_hour:.0f}/h"),
            ("population", _counts(self.groups) or "none"),
            ("outcomes", _counts({kind: self.outcomes.get(kind, 0) for kind in OUTCOMES})),
            ("workers", _counts(self.workers)),
        ]
        if self.faults:
            faults = _counts(dict(sorted(self.faults.items())))
            rows.append(("faults", f"{faults}; the last: {self.trouble}"))
        return rows


def duration(seconds: float) -> str:
    """Return a readable duration: 45 s, 12 min 30 s, 3 h 20 min, 2 d 5 h."""
    total = round(seconds)
    for large, small, unit, subunit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if total >= unit:
            return f"{total // unit} {large} {total % unit // subunit} {small}"
    return f"{total // 60} min {total % 60} s" if total >= 60 else f"{total} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


Show = Callable[[Status], None]
"""Shows a status."""


class Step:
    """The progress of a step of a run.

    Args:
        title: The step, in a few words.
        total: Number of its parts; None if unknown.
    """

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._stage = title, ""
        self._done, self._total = 0, total
        self._began = time.monotonic()

    def advance(self) -> None:
        """Count one more part as done."""
        self._done += 1

    def at(self, stage: str, done: int, total: int) -> None:
        """Set the progress of a stage of the step."""
        self._stage, self._done, self._total = f" {stage}", done, total

    def __rich__(self) -> str:
        """Return the step, its progress, and the time it has taken so far."""
        parts = f"{self._stage} {self._done} of {self._total}," if self._total else ""
        return f"{self._title}:{parts} {duration(time.monotonic() - self._began)}"


@contextmanager
def step(console: Console, title: str, total: int | None = None) -> Iterator[Step]:
    """Show the progress of a step inside the context, from a thread, since this one is busy.

    Plain lines begin after two seconds; every step ends with a line.
    """
    progress = Step(title, total)
    if console.is_terminal:
        with console.status(progress):
            yield progress
    else:
        over = threading.Event()
        printer = threading.Thread(target=_print_lines, args=(console, progress, over), daemon=True)
        printer.start()
        try:
            yield progress
        finally:
            over.set()
            printer.join()
    console.print(progress, soft_wrap=True)


def _print_lines(console: Console, progress: Step, over: threading.Event) -> None:
    seconds = _FIRST_SECONDS
    while not over.wait(seconds):
        seconds = _PLAIN_SECONDS
        console.print(progress, soft_wrap=True)


@contextmanager
def shown(console: Console) -> Iterator[Show]:
    """Yield a function that shows the status of a search: live, or as a line now and then."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda status: live.update(tables_of(status, console.width))
        return
    printed = time.monotonic()

    def show(status: Status) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _PLAIN_SECONDS or status.candidates == status.of:
            printed = time.monotonic()
            best = ", ".join(f"{name} {fitness}" for name, fitness, *_ in status.fitness_rows())
            candidate, *others = [f"{name} {text}" for name, text in status.rows()]
            console.print("  ".join([candidate, best, *others]), soft_wrap=True)

    yield show


def tables_of(status: Status, width: int) -> Group:
    """Return a status as tables: the best with the known metrics, and the course of the search.

    Args:
        width: Width of the terminal; narrow tables omit columns rather than cut words.
    """
    columns = 4 if width >= _WIDE else 3 if width >= _MIDDLE else 2
    fitness = Table(title="prunevolve search")
    for heading in ("", status.unit, "metric", "group")[:columns]:
        is_number = heading == status.unit
        fitness.add_column(heading, justify="right" if is_number else "left", no_wrap=is_number)
    for fields in status.fitness_rows():
        fitness.add_row(*fields[:columns])
    course = Table(show_header=False)
    course.add_column(no_wrap=True)
    course.add_column()
    for row in status.rows():
        course.add_row(*row)
    return Group(fitness, course)


def print_status(folder: RunFolder, console: Console) -> None:
    """Print the status of a run, while it is running or afterwards."""
    status = folder.read_model("status.json", Status)
    console.print(f"{folder.path}: {status.state}, as of {status.written}", soft_wrap=True)
    console.print(tables_of(status, console.width))
    checkpoint = folder.path / "checkpoint.json"
    state = read_state(checkpoint) if checkpoint.exists() else State()
    for record in state.pareto_front:
        criterion = record.criterion
        console.print(
            f"{record.fitness:.4f} {status.unit}, {record.size} nodes, {criterion.group}: "
            f"{criterion.text}",
            soft_wrap=True,
        )
