"""Progress of the work: bars on a terminal, occasional lines elsewhere; always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from pruning.walk import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show bars on a terminal; elsewhere occasional lines, and one at each stage's end."""
    if sys.stderr.isatty():
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
            # Since the previous stage ended: preparations for a stage are part of it.
            print(f"{stage}: {done}/{total} ({now - began:.1f} s)", file=sys.stderr, flush=True)
            began = last = now
        elif now - last > SECONDS_BETWEEN_LINES:
            print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)
            last = now

    yield tell
