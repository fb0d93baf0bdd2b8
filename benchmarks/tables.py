"""Shared by all benchmarks: tables on the screen, and the same figures in a JSON file."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


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


def write_json(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write the figures, if a path was given."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
