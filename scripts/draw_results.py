"""Draw the README's picture, the cost of pruning under each metric, from the table in docs/LOG.md.

All its numbers are read from the log, so the two cannot disagree.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "docs/LOG.md"
SECTION = "all named metrics on three models"
SHOWN = {
    "found without SmolLM2": "found by one search (this project)",
    "directed-snip-wanda": "directed-snip-wanda (this project)",
    "directed-snip-variance": "directed-snip-variance (this project)",
    "snip": "SNIP",
    "ria-full": "RIA (exponent 1)",
    "gblm": "GBLM",
    "wanda": "Wanda",
    "pruner-zero": "Pruner-Zero",
}
"""The log's name of each metric, and its label; in the order of the picture, from the top."""

OURS, PUBLISHED = "#2a7f62", "#6b7785"

# Background and text change together, so the picture is readable on light and dark pages.
_THEMES = """<style>
svg { background: #ffffff } text { fill: #24292f !important }
@media (prefers-color-scheme: dark) {
svg { background: #0d1117 } text { fill: #e6edf3 !important }
}
g[id^="mean"] text { fill: #ffffff !important }
</style>"""
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prunevolve",  # makes the file reproducible
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": PUBLISHED,
    "xtick.color": PUBLISHED,
}


@dataclass(frozen=True)
class Rise:
    """Relative rise of one metric over all cells; 1 is the best published metric of each cell."""

    metric: str
    mean: float
    worst: float


def read_rises(log: str) -> list[Rise]:
    """Return the rows of the log's table for the picture, in the picture's order.

    Raises:
        ValueError: If the log does not have exactly one such section, or its table lacks a metric.
    """
    sections = [part for part in log.split("\n## ") if SECTION in part.partition("\n")[0]]
    if len(sections) != 1:
        raise ValueError(f"the log must have one section {SECTION!r}, got {len(sections)}")
    rows = {}
    for line in sections[0].splitlines():
        cells = [cell.strip(" *`") for cell in line.split("|")]
        if len(cells) == 9 and re.fullmatch(r"[\d.]+", cells[4]):
            rows[cells[1]] = Rise(cells[1], float(cells[4]), float(cells[5]))
    missing = [metric for metric in SHOWN if metric not in rows]
    if missing:
        raise ValueError(f"the log's table must have every metric of the picture; lacks {missing}")
    return [rows[metric] for metric in SHOWN]


def draw(rises: list[Rise]) -> str:
    """Return the picture as SVG text: a bar for each mean, a diamond for each worst cell."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 3.5))
        axes = figure.subplots()
        places = range(len(rises))
        colours = [OURS if "this project" in SHOWN[rise.metric] else PUBLISHED for rise in rises]
        axes.barh(places, [rise.mean for rise in rises], color=colours, height=0.55)
        axes.scatter(
            [rise.worst for rise in rises],
            places,
            marker="D",
            s=30,
            facecolors="none",
            edgecolors=colours,
        )
        for place, rise in zip(places, rises, strict=True):
            axes.text(0.03, place, f"{rise.mean:.3f}", va="center", gid=f"mean-{place}")
            axes.text(rise.worst + 0.05, place, f"{rise.worst:.3f}", va="center")
        axes.axvline(1, color="#d1602b", linewidth=1.2, linestyle="--")
        axes.text(1.02, -0.75, "best published metric of each measurement = 1", fontsize=10)
        axes.set_yticks(places, [SHOWN[rise.metric] for rise in rises])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 2.9), ylim=(len(rises) - 0.4, -1.1))
        axes.set_xlabel(
            "rise of log perplexity over dense, relative to the best published metric's\n"
            "bar = mean of 20 measurements, diamond = worst; lower is better"
        )
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    start = text.index(">", text.index("<svg")) + 1
    return text[:start] + "\n" + _THEMES + text[start:]


def main(
    out: Annotated[Path, typer.Option(help="SVG file to write.")] = ROOT / "docs/results.svg",
) -> None:
    """Draw the picture from the numbers in docs/LOG.md."""
    out.write_text(draw(read_rises(LOG.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"{out}: {len(SHOWN)} metrics")


if __name__ == "__main__":
    typer.run(main)
