"""The report's charts: inline SVG, each with the numbers that it draws.

Drawn with matplotlib's figure class, not pyplot: no window, no global state. A chart is 360 points
wide, so that its 10-point text is still read on a phone, where it fills the page.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import quantiles
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from search.population import Record

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and found by a page search
    "svg.hashsalt": "prunevolve",  # without it the same run gives another file each time
    "text.parse_math": False,  # a name with dollars in it is no formula
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
WIDTH = 5.0
"""Of every chart, inches."""

BEST = "best found"
OUTCOME_COLOURS = {
    "evaluated": "#2a7f62",
    "stopped": "#e3a72f",
    "duplicate": "#9fb4cc",
    "degenerate": "#b07aa1",
    "failed": "#c0392b",
}


@dataclass(frozen=True)
class Chart:
    """A drawing and the numbers in it.

    Attributes:
        title: What it shows; also what a screen reader says.
        svg: One `<svg>` element.
        headings: Of the columns of `rows`.
        rows: The numbers, as they are to be printed.
    """

    title: str
    svg: Markup
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def svg_of(figure: Figure, name: str, label: str, **options: Any) -> Markup:
    """Return a figure as an SVG element whose ids are its own within a page.

    Args:
        figure: It keeps its size; its background is left out.
        name: Put before every id; unique in the page.
        label: What a screen reader says instead.
        options: Passed to `savefig`.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing, **options)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style rule would hold for the whole page: the page has it once.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    head = Markup('<svg role="img" aria-label="{}"').format(label)
    return head + Markup(svg.removeprefix("<svg"))


def fitness_chart(
    name: str,
    records: Sequence[Record],
    places: Sequence[float],
    axis: str,
    unit: str,
    scale: str,
) -> Chart:
    """Draw fitness against a place on an axis: each evaluated candidate, and the best so far.

    Args:
        places: Where each record stands on the axis.
        axis: What the places are, in words.
        unit: Heading of their column.
        scale: What a fitness is in.
    """
    shown = [(places[r.index], r.index, r.fitness) for r in records if r.fitness is not None]
    best = list(accumulate((fitness for _, _, fitness in shown), min))
    across = [place for place, _, _ in shown]
    title = f"Fitness against {unit}"
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.0)
        values = [fitness for _, _, fitness in shown]
        limits, above = _limits_of(values)
        label = f"evaluated, {above} above the chart" if above else "evaluated"
        axes.scatter(across, values, s=7, color="#7a9cc6", label=label)
        axes.plot(across, best, drawstyle="steps-post", color="#b03a2e", label="best so far")
        axes.set(xlabel=axis, ylabel=f"fitness, {scale}", ylim=limits)
        _legend(figure, 2)
        svg = svg_of(figure, name, title)
    rows = [
        (str(index), f"{place:.6g}", f"{fitness:.4f}", f"{least:.4f}")
        for (place, index, fitness), least in zip(shown, best, strict=True)
    ]
    return Chart(title, svg, ("candidate", unit, "fitness", "best so far"), rows)


def front_chart(name: str, best: Sequence[Record], front: Sequence[Record], scale: str) -> Chart:
    """Draw the best fitness of each size, and the line of those that no smaller one beats."""
    title = "Fitness against size"
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.0)
        axes.scatter(
            [r.size for r in best],
            [r.fitness for r in best],
            s=18,
            color="#9aa5b1",
            label="best of its size",
        )
        axes.plot(
            [r.size for r in front],
            [r.fitness for r in front],
            "o-",
            drawstyle="steps-post",
            color="#b03a2e",
            label="Pareto front",
        )
        axes.set(xlabel="size, nodes", ylabel=f"fitness, {scale}")
        _legend(figure, 2)
        svg = svg_of(figure, name, title)
    rows = [
        (
            str(r.size),
            f"{r.fitness:.4f}",
            "yes" if r in front else "",
            str(r.index),
            r.criterion.text,
        )
        for r in best
    ]
    return Chart(title, svg, ("size", "fitness", "on the front", "candidate", "metric"), rows)


def outcomes_chart(
    name: str, outcomes: Mapping[str, Sequence[int]], spans: Sequence[range]
) -> Chart:
    """Draw what became of the candidates, stacked, in bins over the candidates."""
    title = "Outcomes over the candidates"
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.0)
        below = [0] * len(spans)
        for kind, counts in outcomes.items():
            axes.bar(
                [span.start for span in spans],
                counts,
                [len(span) for span in spans],
                below,
                align="edge",
                color=OUTCOME_COLOURS[kind],
                label=kind,
            )
            below = [low + count for low, count in zip(below, counts, strict=True)]
        axes.set(xlabel="candidate", ylabel=f"candidates of each {len(spans[0])}")
        _legend(figure, 3)
        svg = svg_of(figure, name, title)
    columns = zip(*outcomes.values(), strict=True)
    rows = [
        (_span_text(span), *map(str, column)) for span, column in zip(spans, columns, strict=True)
    ]
    return Chart(title, svg, ("candidates", *outcomes), rows)


def shares_chart(
    name: str, title: str, shares: Mapping[str, Sequence[float]], spans: Sequence[range]
) -> Chart:
    """Draw, for each leaf or operator, the share of the bred metrics that contain it."""
    edges = [span.start for span in spans] + [spans[-1].stop]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _figure(1.0 + 0.2 * len(shares))
        mesh = axes.pcolormesh(
            edges,
            range(len(shares) + 1),
            list(shares.values()),
            cmap=_shades("Blues"),
            vmin=0,
            vmax=1,
        )
        axes.set_yticks([row + 0.5 for row in range(len(shares))], list(shares))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("candidate")
        _percent_bar(figure, mesh, axes)
        svg = svg_of(figure, name, title)
    columns = zip(*shares.values(), strict=True)
    rows = [
        (_span_text(span), *(f"{share:.0%}" for share in column))
        for span, column in zip(spans, columns, strict=True)
    ]
    return Chart(title, svg, ("candidates", *shares), rows)


def lines_chart(
    name: str, title: str, axis: str, lines: Mapping[str, Mapping[Any, float]]
) -> Chart:
    """Draw fractions as percentages: one line a metric over blocks, or points over names.

    Args:
        lines: For each metric the fraction at each place; the places are numbers or names.
    """
    places = list(dict.fromkeys(place for line in lines.values() for place in line))
    named = any(isinstance(place, str) for place in places)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.3)
        others = [metric for metric in lines if metric != BEST]
        for metric, line in lines.items():
            axes.plot(
                list(line),
                [100 * value for value in line.values()],
                "o" if named else "-",
                color="black" if metric == BEST else f"C{others.index(metric)}",
                linewidth=2.2 if metric == BEST else 1.4,
                zorder=3 if metric == BEST else 2,
                label=metric,
            )
        axes.set(xlabel=axis, ylabel="mean over layers, %")
        if named:
            axes.tick_params(axis="x", rotation=30)
        _legend(figure, 3)
        svg = svg_of(figure, name, title)
    rows = [
        (str(place), *(_percent(line.get(place)) for line in lines.values())) for place in places
    ]
    return Chart(title, svg, (axis, *lines), rows)


def map_chart(name: str, title: str, cells: Mapping[tuple[str, int], float]) -> Chart:
    """Draw the fraction of each layer: kinds of matrix downwards, blocks across."""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    grid = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = _figure(1.0 + 0.22 * len(kinds))
        mesh = axes.pcolormesh(grid, cmap=_shades("viridis_r"), vmin=0, vmax=1)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
        step = max(1, len(blocks) // 8)
        shown = range(0, len(blocks), step)
        axes.set_xticks([column + 0.5 for column in shown], [str(blocks[c]) for c in shown])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("block")
        _percent_bar(figure, mesh, axes)
        svg = svg_of(figure, name, title)
    rows = [(kind, *(_percent(cells.get((kind, block))) for block in blocks)) for kind in kinds]
    return Chart(title, svg, ("block", *map(str, blocks)), rows)


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _limits_of(values: Sequence[float]) -> tuple[tuple[float, float] | None, int]:
    """Return where a fitness axis begins and ends, and how many values lie above.

    The worst tenth is left out once there are many, so that the line of the best is no flat one;
    the first value, where that line begins, is always in.
    """
    if len(values) < 50:
        return None, 0
    top = max(values[0], quantiles(values, n=10)[-1])
    margin = 0.05 * (top - min(values))
    return (min(values) - margin, top + margin), sum(value > top + margin for value in values)


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper center", ncols=columns)


def _shades(name: str) -> Any:
    # Of more than 50 shades matplotlib makes a bitmap.
    return matplotlib.colormaps[name].resampled(20)


def _percent_bar(figure: Figure, mesh: Any, axes: Any) -> None:
    bar = figure.colorbar(
        mesh, ax=axes, format=lambda share, _: f"{share:.0%}", ticks=(0, 0.5, 1), pad=0.02
    )
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _span_text(span: range) -> str:
    return f"{span.start}–{span.stop - 1}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
