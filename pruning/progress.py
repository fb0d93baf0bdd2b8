"""Progress of the work, on stderr: a spinner and bars on a terminal, occasional lines elsewhere.

It goes to what is stderr when it begins, so that what a library prints later can be dropped.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the units done and the units in all."""

PATIENCE = 2.0
"""Fewest seconds between two lines."""

_LONGEST_SILENCE = 60.0


def unwatched(stage: str, done: int, total: int) -> None:
    """Ignore the progress."""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show on a terminal what is being done."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(what):
        yield


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show bars on a terminal; elsewhere occasional lines, and one at each stage's end."""
    if not sys.stderr.isatty():
        yield Lines().tell
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID, TimeElapsedColumn

    columns = (*Bars.get_default_columns(), TimeElapsedColumn())
    with Bars(*columns, console=Console(file=sys.stderr)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


class Lines:
    """Progress in plain lines on stderr: the longer a stage takes, the rarer they are."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._stream = sys.stderr

    def tell(self, stage: str, done: int, total: int) -> None:
        """Take how far a stage is; say it if nothing was said for long, and the stage's end."""
        now = time.monotonic()
        took = now - self._began
        if done >= total:
            # Since the stage before it ended: what leads up to a stage is part of it.
            print(f"{stage}: {done}/{total} ({took:.1f} s)", file=self._stream, flush=True)
            self._began = self._last = now
        elif now - self._last > min(_LONGEST_SILENCE, max(PATIENCE, took / 10)):
            print(f"{stage}: {done}/{total}, {took:.0f} s so far", file=self._stream, flush=True)
            self._last = now
