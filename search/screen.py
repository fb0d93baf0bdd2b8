"""Progress for a person: a live table on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from search.population import OUTCOMES, Record, State

_PLAIN_SECONDS = 10.0


@dataclass
class Screen:
    """Shows how a search goes; use as a context manager.

    Attributes:
        candidates: How many will be bred.
        outcomes: Of those that are committed, by kind.
    """

    console: Console
    candidates: int
    outcomes: Counter[str]

    def __post_init__(self) -> None:
        self._live: Live | None = None
        self._started = self._printed = time.monotonic()
        self._first = self.done = self.outcomes.total()

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4)
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

    def show(self, record: Record, state: State) -> None:
        """Show the state after one more outcome."""
        self.outcomes[record.outcome.kind] += 1
        self.done = record.index + 1
        now = time.monotonic()
        if self._live:
            self._live.update(self._table(state))
        elif now - self._printed >= _PLAIN_SECONDS or self.done == self.candidates:
            self._printed = now
            self.console.print("  ".join(f"{k} {v}" for k, v in self._rows(state)), soft_wrap=True)

    def _table(self, state: State) -> Table:
        table = Table(title="prunevolve search", show_header=False)
        for key, value in self._rows(state):
            table.add_row(key, value)
        return table

    def _rows(self, state: State) -> list[tuple[str, str]]:
        seconds = time.monotonic() - self._started
        fresh = self.done - self._first
        pace = fresh / seconds if seconds > 0 else 0.0
        left = (self.candidates - self.done) / pace if pace else 0.0
        kinds = ", ".join(f"{self.outcomes[kind]} {kind}" for kind in OUTCOMES)
        best = state.best
        return [
            ("candidate", f"{self.done}/{self.candidates}"),
            ("best", f"{best.criterion.text} ({best.criterion.group})" if best else "none yet"),
            ("fitness", f"{best.fitness:.4f} nats/token" if best else "-"),
            ("population", _groups_text(state)),
            ("pace", f"{pace * 3600:.0f}/h"),
            ("left", f"{left / 60:.0f} min"),
            ("outcomes", kinds),
        ]


def _groups_text(state: State) -> str:
    """Return how many members there are of each comparison group; each has a mask of its own."""
    groups = Counter(record.criterion.group for record in state.population)
    return ", ".join(f"{count} {group}" for group, count in sorted(groups.items())) or "none"
