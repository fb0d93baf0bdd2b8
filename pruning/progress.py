"""Progress of the work: bars on a terminal, occasional lines elsewhere; always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, Timer

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the units done and the units in all."""

PATIENCE = 2.0
"""Seconds that may pass without a word."""

_LONGEST_SILENCE = 60.0


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done if it takes longer than `PATIENCE`: a spinner, or a line."""
    if sys.stderr.isatty():
        from rich.console import Console

        status = Console(stderr=True).status(what)
        say, end = status.start, status.stop
    else:
        say, end = lambda: _say(f"{what} ..."), lambda: None
    timer = Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        end()


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show bars on a terminal; elsewhere occasional lines, and one at each stage's end.

    A line also comes while a single unit of work takes long.
    """
    if sys.stderr.isatty():
        with _bars() as show:
            yield show
        return
    lines, over = Lines(), Event()

    def beat() -> None:
        while not over.wait(PATIENCE):
            lines.beat()

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lines.tell
    finally:
        over.set()
        thread.join()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID, TimeElapsedColumn

    columns = (*Bars.get_default_columns(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


class Lines:
    """Progress in plain lines on stderr: the longer a stage takes, the rarer they are."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._latest = ""
        self._began = self._last = time.monotonic()

    def tell(self, stage: str, done: int, total: int) -> None:
        """Take how far a stage is, and say its end."""
        with self._lock:
            now = time.monotonic()
            self._latest = f"{stage}: {done}/{total}"
            if done < total:
                self._say_if_due(now)
                return
            # Since the stage before it ended: what leads up to a stage is part of it.
            _say(f"{self._latest} ({now - self._began:.1f} s)")
            self._latest = ""
            self._began = self._last = now

    def beat(self) -> None:
        """Say how far it is, if nothing was said for long."""
        with self._lock:
            self._say_if_due(time.monotonic())

    def _say_if_due(self, now: float) -> None:
        took = now - self._began
        if self._latest and now - self._last > min(_LONGEST_SILENCE, max(PATIENCE, took / 10)):
            _say(f"{self._latest}, {took:.0f} s so far")
            self._last = now


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
