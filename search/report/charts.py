"""The report's charts of masks and of breeding: inline SVG, each with the numbers that it shows.

They use matplotlib's Figure class, not pyplot: no window, no global state. A chart is 360 points
wide, so that its 10-point text is legible on a phone, where it fills the page. Series differ in
marker, dashes or hatching as well as in colour.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from search.report.palette import LIGHT, shades, themed

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and searchable in the page
    "svg.hashsalt": "prunevolve",  # without it, the file differs each time
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    # matplotlib omits black from the SVG, so black could not follow the page's colour scheme.
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
        LIGHT["ink"],
    ),
}
WIDTH = 5.0
"""Width of every chart, in inches."""

BEST = "best found"
MARKERS = "os^Dvp"
SERIES = tuple(LIGHT[f"series-{i}"] for i in range(7))
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2)))
_HATCHES = {"evaluated": "", "stopped": "//", "duplicate": "..", "degenerate": "xx", "failed": "--"}


@dataclass(frozen=True)
class Chart:
    """A drawing and the numbers in it.

    Attributes:
        title: Its subject.
        svg: One `<svg>` element, with a label that describes it.
        headings: The column headings of `rows`.
        rows: The numbers, as printed.
        note: How to read it; empty if that is obvious.
    """

    title: str
    svg: Markup
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def svg_of(figure: Figure, name: str, label: str, **options: Any) -> Markup:
    """Return a figure as an SVG element in the page's colours, with unique ids.

    Args:
        figure: The figure; its size is kept, its background omitted.
        name: The prefix of every id; unique in the page.
        label: The description for screen readers.
        options: Passed to `savefig`.
    """
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata, **options)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style rule would apply to the whole page, which contains it once already.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    head = Markup('<svg role="img" aria-label="{}"').format(label)
    return head + Markup(themed(svg.removeprefix("<svg")))


def outcomes_chart(
    name: str, outcomes: Mapping[str, Sequence[int]], spans: Sequence[range]
) -> Chart:
    """Draw the outcomes as stacked bars, in bins over the candidates."""
    title = "Outcomes over the candidates"
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(3.0)
        bottoms = [0] * len(spans)
        for kind, counts in outcomes.items():
            axes.bar(
                [span.start for span in spans],
                counts,
                [len(span) for span in spans],
                bottoms,
                align="edge",
                color=LIGHT[kind],
                edgecolor=LIGHT["paper"],
                linewidth=0,
                hatch=_HATCHES[kind],
                label=kind,
            )
            bottoms = [low + count for low, count in zip(bottoms, counts, strict=True)]
        axes.set(xlabel="candidate", ylabel=f"candidates per {len(spans[0])}")
        whole_ticks(axes.xaxis, axes.yaxis)
        legend(figure, 3)
        totals = (f"{sum(counts)} {kind}" for kind, counts in outcomes.items())
        svg = svg_of(figure, name, f"{title}: {', '.join(totals)}")
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
        figure, axes = figure_of(1.0 + 0.2 * len(shares))
        mesh = axes.pcolormesh(
            edges,
            range(len(shares) + 1),
            list(shares.values()),
            cmap=shades("share"),
            vmin=0,
            vmax=1,
        )
        axes.set_yticks([row + 0.5 for row in range(len(shares))], list(shares))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("candidate")
        whole_ticks(axes.xaxis)
        _percent_bar(figure, mesh, axes)
        ends = (f"{key} from {row[0]:.0%} to {row[-1]:.0%}" for key, row in shares.items())
        svg = svg_of(figure, name, f"{title}, first to last candidates: {', '.join(ends)}")
    columns = zip(*shares.values(), strict=True)
    rows = [
        (_span_text(span), *(f"{share:.0%}" for share in column))
        for span, column in zip(spans, columns, strict=True)
    ]
    return Chart(title, svg, ("candidates", *shares), rows)


def lines_chart(
    name: str, title: str, axis: str, lines: Mapping[str, Mapping[Any, float]]
) -> Chart:
    """Draw fractions as percentages: one line per metric over blocks, or points over names.

    Nothing is hidden: metrics with the same numbers share a line, and at each name the metrics'
    points lie side by side.

    Args:
        lines: Each metric's fraction at each place; the places are numbers or names.
    """
    places = list(dict.fromkeys(place for line in lines.values() for place in line))
    series = _merge_equal(lines)
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(3.3)
        if any(isinstance(place, str) for place in places):
            _points(axes, series, places)
        else:
            _lines(axes, series)
            whole_ticks(axes.xaxis)
        axes.set(xlabel=axis, ylabel="mean over layers, %")
        legend(figure, 2 if max(map(len, series)) > 15 else 3)
        ranges = (
            f"{label} {min(line.values()):.1%} to {max(line.values()):.1%}"
            for label, line in series.items()
            if line
        )
        svg = svg_of(figure, name, f"{title}: {', '.join(ranges)}")
    rows = [
        (str(place), *(_percent(line.get(place)) for line in lines.values())) for place in places
    ]
    return Chart(title, svg, (axis, *lines), rows)


def _merge_equal(lines: Mapping[str, Mapping[Any, float]]) -> dict[str, Mapping[Any, float]]:
    """Return the lines, with equal ones merged into one that has all their names."""
    names: dict[tuple[tuple[Any, float], ...], list[str]] = {}
    for metric, line in lines.items():
        names.setdefault(tuple((place, round(v, 4)) for place, v in line.items()), []).append(
            metric
        )
    return {", ".join(equal): lines[equal[0]] for equal in names.values()}


def _lines(axes: Any, series: Mapping[str, Mapping[Any, float]]) -> None:
    for number, (label, line) in enumerate(series.items()):
        best = label.split(", ")[0] == BEST
        # Each line is thinner than the one below it, so that both show where they coincide.
        axes.plot(
            list(line),
            [100 * value for value in line.values()],
            linestyle="-" if best else _DASHES[number % len(_DASHES)],
            linewidth=4 if best else max(1.2, 3.2 - 0.4 * number),
            color=LIGHT["dim"] if best else SERIES[number % len(SERIES)],
            marker=None if best else MARKERS[number % len(MARKERS)],
            markersize=5,
            # Stagger the markers, so that those of close lines do not overlap.
            markevery=(number % max(1, len(line)), max(1, min(len(series), len(line) // 2))),
            zorder=2 + number / len(series),
            label=label,
        )


def _points(axes: Any, series: Mapping[str, Mapping[Any, float]], places: Sequence[Any]) -> None:
    step = 0.8 / len(series)
    for number, (label, line) in enumerate(series.items()):
        best = label.split(", ")[0] == BEST
        axes.plot(
            [places.index(p) + step * (number - (len(series) - 1) / 2) for p in line],
            [100 * value for value in line.values()],
            linestyle="",
            marker="*" if best else MARKERS[number % len(MARKERS)],
            markersize=9 if best else 5,
            color=LIGHT["ink"] if best else SERIES[number % len(SERIES)],
            label=label,
        )
    axes.set_xticks(range(len(places)), places, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xticks([i + 0.5 for i in range(len(places) - 1)], minor=True)
    axes.grid(visible=False, axis="x")
    axes.grid(visible=True, axis="x", which="minor")
    axes.tick_params(axis="x", which="minor", length=0)


def map_chart(name: str, title: str, cells: Mapping[tuple[str, int], float]) -> Chart:
    """Draw each layer's fraction as a heat map: kinds of matrix downwards, blocks across."""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    grid = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = figure_of(1.0 + 0.22 * len(kinds))
        mesh = axes.pcolormesh(grid, cmap=shades("zeros"), vmin=0, vmax=1)
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
        step = max(1, len(blocks) // 8)
        shown = range(0, len(blocks), step)
        axes.set_xticks([column + 0.5 for column in shown], [str(blocks[c]) for c in shown])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel("block")
        _percent_bar(figure, mesh, axes)
        low, high = (extreme(cells, key=lambda cell: cells[cell]) for extreme in (min, max))
        description = (
            f"{title}: from {cells[low]:.1%} in {low[0]} of block {low[1]} to {cells[high]:.1%} "
            f"in {high[0]} of block {high[1]}"
        )
        svg = svg_of(figure, name, description)
    rows = [(kind, *(_percent(cells.get((kind, block))) for block in blocks)) for kind in kinds]
    return Chart(title, svg, ("block", *map(str, blocks)), rows)


def figure_of(height: float) -> tuple[Figure, Any]:
    """Return a figure of this height in inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def legend(figure: Figure, columns: int) -> None:
    """Put the legend above the axes, where it covers nothing."""
    figure.legend(loc="outside upper center", ncols=columns)


def whole_ticks(*axis: Any) -> None:
    """Put ticks at whole numbers only: there is no half block."""
    for each in axis:
        each.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


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
