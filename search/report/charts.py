"""The chart of a search as SVG, as matplotlib saves it; without pyplot, which has global state."""

import io
import math
from collections.abc import Sequence
from itertools import accumulate

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prunevolve.search.population import Record
from prunevolve.search.scale import Scale

_MOST_POINTS = 2000  # a point takes sixty bytes
_OF_INTEREST = 3.0
"""How far above dense the chart reaches, in rises of the best baseline."""

_BEST, _POINT, _LINE = "#c0392b", "#8db3d9", "#555555"

_STYLE: dict[str, object] = {
    "svg.hashsalt": "prunevolve",  # without it, the file differs each time
    "path.simplify": False,  # it would drop the lines of no length that are the dots
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def fitness_chart(records: Sequence[Record], scale: Scale) -> str:
    """Draw the fitness of evaluated candidates in the order of breeding, and the best so far.

    Horizontal lines are the dense model and the baselines. The chart leaves out what is far above
    the best baseline, or the line of the best would look flat; the label of its axis says how many.

    Args:
        records: Evaluated candidates, in the order of breeding.

    Returns:
        An SVG document, the same for the same arguments. It is 360 points wide, so that its
        10-point text is legible on a phone.
    """
    fitness = [record.rank[0] for record in records]
    best = list(accumulate(fitness, min))
    known = {"dense": scale.dense_fitness, **scale.named_fitness}
    low = min(*known.values(), *fitness)
    limit = scale.dense_fitness + _OF_INTEREST * (
        min(scale.named_fitness.values()) - scale.dense_fitness
    )
    top = max(limit, low + 1.3 * (best[-1] - low))  # the best is always inside
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_ylim(low - 0.05 * (top - low), top)
        _draw_points(axes, records[:: math.ceil(len(records) / _MOST_POINTS)])
        places = [record.index for record in records]
        axes.step(places, best, where="post", color=_BEST, linewidth=1.6)
        _draw_lines(axes, {"best so far": best[-1]} | known)
        above = sum(value > top for value in (*fitness, *known.values()))
        note = f"; {above} above the chart" if above else ""
        axes.set_ylabel(f"fitness, x best named{note}")
        axes.set_xlabel("candidates")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None})
        return text.getvalue()


def _draw_points(axes: Axes, records: Sequence[Record]) -> None:
    """Draw a dot for each record, all in one path: a marker for each would take more space."""
    places, values = [], []
    for record in records:
        # A line of no length with round ends.
        places += [record.index, record.index, math.nan]
        values += [record.rank[0], record.rank[0], math.nan]
    axes.plot(places, values, color=_POINT, linewidth=3.5, solid_capstyle="round")


def _draw_lines(axes: Axes, values: dict[str, float]) -> None:
    """Draw a named horizontal line for each value; names that would overlap move up."""
    low, top = axes.get_ylim()
    lowest, beside = low, axes.get_yaxis_transform()
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        if value > top:
            break
        if name != "best so far":
            style = "dashed" if name == "dense" else "solid"
            axes.axhline(value, color=_LINE, linewidth=0.7, linestyle=style, zorder=1)
        height = max(value, lowest)
        lowest = height + 0.055 * (top - low)
        color = _BEST if name == "best so far" else _LINE
        ends = [1.0, 1.04], [value, height]
        axes.plot(*ends, color=color, linewidth=0.7, transform=beside, clip_on=False)
        axes.text(1.05, height, name, color=color, transform=beside, va="center")
