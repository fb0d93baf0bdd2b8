"""Progress for a person: a live table on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from search.journal import RunFolder
from search.status import Status

_PLAIN_SECONDS = 10.0


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
            self._live.update(table_of(status))
        elif now - self._printed >= _PLAIN_SECONDS or status.candidates == status.of:
            self._printed = now
            line = "  ".join(f"{name} {text}" for name, text in status.rows())
            self._console.print(line, soft_wrap=True)


def table_of(status: Status) -> Table:
    """Return a status as a table."""
    table = Table(title="prunevolve search", show_header=False)
    for name, text in status.rows():
        table.add_row(name, text)
    return table


def print_status(folder: RunFolder, console: Console) -> None:
    """Print where a run stands, while it goes on or after it."""
    status = Status(**folder.read_json("status.json", *Status.__annotations__))
    console.print(f"{folder.path}: {status.state}, as of {status.written}", soft_wrap=True)
    console.print(table_of(status))
    unit = (status.best or {}).get("unit", "")
    for record in folder.read_checkpoint().pareto_front:
        criterion = record.criterion
        console.print(
            f"{record.fitness:.4f} {unit}, {record.size} nodes, {criterion.group}: "
            f"{criterion.text}",
            soft_wrap=True,
        )
