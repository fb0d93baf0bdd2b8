"""Progress of the work: bars on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, NoReturn, Protocol

from rich import progress as rich_progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from prunevolve.command_line import check_interrupt

# Called with the stage's name, the units done and the units in all.
Progress = Callable[[str, int, int], None]


class Show(Protocol):
    """A `Progress` that also takes lines about the stage, shown in place of those before."""

    def __call__(self, stage: str, done: int, total: int, about: Sequence[str] = ()) -> None: ...


class PlainConsole(Console):
    """A console on stdout or a file: prints text as it is, and raises BrokenPipeError."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__(file=file, emoji=False, highlight=False, markup=False, soft_wrap=True)

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error that rich is handling, in place of SystemExit."""
        raise


def unwatched(stage: str, done: int, total: int) -> None:
    """Ignore the progress."""


def on_stderr() -> Console:
    """Return a console on what is stderr now: what libraries print later may be dropped."""
    return PlainConsole(sys.stderr)


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Show what is done inside the context: a spinner on a terminal, elsewhere one line."""
    if not console.is_interactive:
        console.print(title)
    with console.status(Text(title)):  # which shows nothing elsewhere
        yield
    check_interrupt()


@contextmanager
def shown_progress(console: Console, before: float = 0.0) -> Iterator[Show]:
    """Show stages inside the context: as bars on a terminal, elsewhere as plain lines.

    Earlier processes worked on the first one for the seconds `before`.
    """
    if not console.is_interactive:
        yield _lines(console, before)
        return
    columns = (rich_progress.MofNCompleteColumn(), rich_progress.TimeElapsedColumn())
    bars = rich_progress.Progress(*rich_progress.Progress.get_default_columns(), *columns)
    tasks: dict[str, rich_progress.TaskID] = {}
    with Live(bars, console=console) as live:

        def show(stage: str, done: int, total: int, about: Sequence[str] = ()) -> None:
            check_interrupt()
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, completed=done, total=total)
                if before and len(tasks) == 1:
                    bars.tasks[0].start_time = bars.get_time() - before
            bars.update(tasks[stage], completed=done, total=total)
            live.update(Group(bars, *map(Text, about)))

        yield show


def _lines(console: Console, before: float) -> Show:
    """Return progress in plain lines, every 10 to 60 seconds and at the end of each stage."""
    printed = time.monotonic()
    began = printed - before
    firsts: dict[str, tuple[float, int]] = {}

    def show(stage: str, done: int, total: int, about: Sequence[str] = ()) -> None:
        nonlocal began, printed
        check_interrupt()
        now = time.monotonic()
        since, first = firsts.setdefault(stage, (now, done))
        if done >= total:
            # Since the stage before it ended: what leads up to a stage is part of it.
            state, began = f" ({now - began:.1f} s)", now
        elif now - printed > min(60, max(10, (now - began) / 10)):
            state = f", {timedelta(seconds=round(now - began))} so far"
            if done > first:
                left = (now - since) / (done - first) * (total - done)
                state += f", {timedelta(seconds=round(left))} left"
        else:
            return
        printed = now
        console.print("; ".join([f"{stage}: {done}/{total}{state}", *about]))

    return show
