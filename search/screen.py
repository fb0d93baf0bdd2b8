"""Progress for a person: a live table on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from search.journal import RunFolder
from search.status import NEEDED, Status, duration

_FIRST_SECONDS, _PLAIN_SECONDS = 2.0, 10.0
"""Before the first plain line about a step that goes on, and between two plain lines."""

_WIDE, _MIDDLE = 76, 50
"""Columns of a terminal below which a table leaves out the group, and also the metric."""


class Step:
    """How far a step of a run is.

    Args:
        what: The step, in a few words.
        total: Parts that it has; None if that is not known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._stage = what, ""
        self._done, self._total = 0, total
        self._began = time.monotonic()

    def advance(self) -> None:
        """Count one more part as done."""
        self._done += 1

    def at(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage of the step is."""
        self._stage, self._done, self._total = f" {stage}", done, total

    @property
    def line(self) -> str:
        """The step, how far it is, and how long it took so far."""
        parts = f"{self._stage} {self._done} of {self._total}," if self._total else ""
        return f"{self._what}:{parts} {duration(time.monotonic() - self._began)}"


@contextmanager
def step(console: Console, what: str, total: int | None = None) -> Iterator[Step]:
    """While open, show how a step gets on; a thread does it, as the step keeps this one busy.

    In plain lines nothing is said in the first two seconds; a line tells the end of any step.
    """
    going = Step(what, total)
    if console.is_terminal:
        spinner = Spinner("dots")

        def shown() -> Spinner:
            spinner.update(text=going.line)
            return spinner

        with Live(get_renderable=shown, console=console, refresh_per_second=4, transient=True):
            yield going
        console.print(going.line, soft_wrap=True)
        return
    over = threading.Event()
    teller = threading.Thread(target=_tell, args=(console, going, over), daemon=True)
    teller.start()
    try:
        yield going
    finally:
        over.set()
        teller.join()
    console.print(going.line, soft_wrap=True)


def _tell(console: Console, going: Step, over: threading.Event) -> None:
    wait = _FIRST_SECONDS
    while not over.wait(wait):
        wait = _PLAIN_SECONDS
        console.print(going.line, soft_wrap=True)


class Screen:
    """Shows how a search goes; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> "Screen":
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: Status) -> None:
        """Show a status; in plain lines not too often, and the last one."""
        now = time.monotonic()
        if self._live:
            self._live.update(tables_of(status, self._console.width))
        elif now - self._printed >= _PLAIN_SECONDS or status.candidates == status.of:
            self._printed = now
            best = [f"{name} {fitness}" for name, fitness, *_ in status.fitness_rows()]
            others = [f"{name} {text}" for name, text in status.rows()]
            line = "  ".join([others[0], ", ".join(best), *others[1:]])
            self._console.print(line, soft_wrap=True)


def tables_of(status: Status, width: int) -> Group:
    """Return a status as tables: what is best beside what is known, and how the search goes.

    Args:
        width: Columns of the terminal; on a narrow one columns are left out, no word is cut.
    """
    shown = 4 if width >= _WIDE else 3 if width >= _MIDDLE else 2
    fitness = Table(title="prunevolve search")
    for heading in ("", status.unit, "metric", "group")[:shown]:
        numbers = heading == status.unit
        fitness.add_column(heading, justify="right" if numbers else "left", no_wrap=numbers)
    for row in status.fitness_rows():
        fitness.add_row(*row[:shown])
    course = Table(show_header=False)
    course.add_column(no_wrap=True)
    course.add_column()
    for name, text in status.rows():
        course.add_row(name, text)
    return Group(fitness, course)


def print_status(folder: RunFolder, console: Console) -> None:
    """Print where a run stands, while it goes on or after it."""
    status = Status(**folder.read_json("status.json", *NEEDED))
    console.print(f"{folder.path}: {status.state}, as of {status.written}", soft_wrap=True)
    console.print(tables_of(status, console.width))
    for record in folder.read_checkpoint().pareto_front:
        criterion = record.criterion
        console.print(
            f"{record.fitness:.4f} {status.unit}, {record.size} nodes, {criterion.group}: "
            f"{criterion.text}",
            soft_wrap=True,
        )
