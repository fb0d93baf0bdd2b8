"""Shared by all benchmarks: tables on the screen, and the same figures in a JSON file."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

LOCAL_WIKITEXT2 = ROOT.parent / "shared" / "data" / "wikitext2"
"""A copy of WikiText-2 beside the project; without it, the hub's is used."""


def wikitext2_corpora() -> tuple[str, str]:
    """Return the corpora of the validation and the test text: local files, or the hub's name."""
    if LOCAL_WIKITEXT2.is_dir():
        return (
            str(LOCAL_WIKITEXT2 / "valid.tokens.txt"),
            str(LOCAL_WIKITEXT2 / "test.raw.txt"),
        )
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


def show(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=110).print(table)


def write_json(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write the figures, if a path was given."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
