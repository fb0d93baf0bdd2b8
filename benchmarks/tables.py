"""Shared by all benchmarks: tables on the screen, and the same figures in a JSON file."""

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


Kept = TypeVar("Kept")


def kept(path: Path, measure: Callable[[], Kept]) -> Kept:
    """Return what a JSON file holds; if there is none, measure it first."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(measure(), indent=1), encoding="utf-8")
        temporary.replace(path)
    result: Kept = json.loads(path.read_text(encoding="utf-8"))
    return result


def wikitext2_corpora() -> tuple[str, str]:
    """Return the validation and the test text: those in `build/wikitext2`, or else the hub's."""
    local = ROOT / "build" / "wikitext2"
    if local.is_dir():
        return str(local / "valid.tokens.txt"), str(local / "test.raw.txt")
    return "wikitext2", "wikitext2"


def conditions(dtype: str) -> dict[str, object]:
    """Return the conditions of a measurement besides the code: cores, dtype, versions, date."""
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "dtype": dtype,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print one table; numbers that are not whole are rounded to six digits."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row))
    Console(highlight=False, width=110).print(table)


def show_rises(
    title: str,
    rises: Mapping[str, Mapping[str, float]],
    more: Mapping[str, Mapping[str, str]],
) -> None:
    """Print one table of metrics in the order of their mean rise, each with its worst cell.

    Args:
        title: Stands above the table.
        rises: Relative rises by metric and cell; a metric without a cell is left out.
        more: Texts by metric for further columns, by their headings.
    """
    means = {name: fmean(by_cell.values()) for name, by_cell in rises.items() if by_cell}
    rows = []
    for name in sorted(means, key=means.__getitem__):
        values = rises[name]
        worst = max(values, key=values.__getitem__)
        losses = f"{sum(value > 1 for value in values.values())} of {len(values)}"
        row = [name, f"{means[name]:.3f}", f"{values[worst]:.3f}", worst, losses]
        rows.append([*row, *(texts[name] for texts in more.values())])
    show(title, ["metric", "mean", "worst", "where", "above 1", *more], rows)


def write_json(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write the figures, if a path was given."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
