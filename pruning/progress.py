"""How far the work is: bars on a terminal, a line now and then elsewhere; always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

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
        say, end = lambda: print(f"{what} ...", file=sys.stderr, flush=True), lambda: None
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
    """Show bars on a terminal; elsewhere a line now and then, and one at each stage's end."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bars
        from rich.progress import TaskID

        with Bars(console=Console(stderr=True)) as bars:
            tasks: dict[str, TaskID] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage)
                bars.update(tasks[stage], completed=done, total=total)

            yield show
        return
    began = last = time.monotonic()

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal began, last
        now = time.monotonic()
        if done == total:
            # Since the stage before it ended: what leads up to a stage is part of it.
            print(f"{stage}: {done}/{total} ({now - began:.1f} s)", file=sys.stderr, flush=True)
            began = last = now
        elif now - last > min(_LONGEST_SILENCE, max(PATIENCE, (now - began) / 10)):
            # The longer a stage takes, the rarer a line.
            print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)
            last = now

    yield tell
