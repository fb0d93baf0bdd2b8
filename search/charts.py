"""The chart of a search as SVG, as matplotlib saves it; without pyplot, which has global state."""

import io
import math
from bisect import insort
from collections.abc import Sequence
from itertools import accumulate

import matplotlib
from matplotlib.figure import Figure

from prunevolve.pruning.json_file import JsonObject
from prunevolve.search.records import Record

_MOST_POINTS = 1000  # candidates that are drawn: each takes a hundred bytes
_OF_INTEREST = 3.0  # the highest fitness that the chart shows, if the best is not above it

NARROW, WIDE = 5.0, 9.6
"""Inches: of a chart for a phone, whose 10-point text is legible there, and for a screen."""

_STYLE: dict[str, object] = {
    "svg.hashsalt": "prunevolve",  # without it, the file differs each time
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def fitness_chart(records: Sequence[Record], population: int, width: float = NARROW) -> str:
    """Draw the fitness of evaluated candidates in the order of breeding, the best so far, and the
    median of the best ones so far, as many as the population has.

    Horizontal lines are the dense model, at 0, and the best baseline, at 1. The chart leaves out
    what is far above, or the line of the best would look flat; its axis says how many. At least one
    candidate of the journal is evaluated; the width is in inches.
    """
    evaluated = [record for record in records if record.fitness is not None]
    fitness = [record.rank[0] for record in evaluated]
    best = list(accumulate(fitness, min))
    low, top = min(0.0, best[-1]), max(_OF_INTEREST, 1.3 * best[-1])
    above = sum(value > top for value in fitness)
    dots = evaluated[:: math.ceil(len(evaluated) / _MOST_POINTS)]
    ranked: list[float] = []
    median = []
    for value in fitness:
        insort(ranked, value)
        del ranked[population:]
        median.append(ranked[len(ranked) // 2])
    lines = {"best so far": (best, 1.0), f"median of the best {population}": (median, 0.4)}
    # The last values hold up to the last candidate, whatever became of that.
    indices = [*(record.index for record in evaluated), records[-1].index]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_ylim(low - 0.15, top)
        axes.plot([r.index for r in dots], [r.rank[0] for r in dots], ".", color="#8db3d9")
        for name, (values, alpha) in lines.items():
            steps = [*values, values[-1]]
            axes.step(indices, steps, where="post", color="#c0392b", alpha=alpha, label=name)
        for level, name in enumerate(("dense", "best baseline")):
            axes.axhline(level, color="#555555", linewidth=0.7, zorder=1)
            axes.annotate(name, (1.02, level), xycoords=("axes fraction", "data"), va="center")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        axes.set_ylabel("fitness" + (f"; {above} candidates lie above" if above else ""))
        axes.set_xlabel("candidates")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None})
        return text.getvalue()


def path_chart(path: Sequence[JsonObject]) -> str:
    """Draw the fitness on both texts along the path of `summary.json`, by the number of factors."""
    steps = sorted(path, key=lambda step: step["factors"])
    factors = [step["factors"] for step in steps]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(NARROW, 3.0), layout="constrained")
        axes = figure.subplots()
        for name, color in (("fitness", "#8db3d9"), ("selection", "#c0392b")):
            values = [step[name] for step in steps]
            axes.plot(factors, values, ".-", color=color, label=f"{name} text")
        for step in steps:
            if step["chosen"]:
                axes.axvline(step["factors"], color="#555555", linewidth=0.7, zorder=1)
                axes.annotate("chosen", (step["factors"], 1.01), xycoords=("data", "axes fraction"))
        lowest = min(step["fitness"] + step["selection"] for step in steps) / 2
        axes.set_ylim(top=min(axes.get_ylim()[1], lowest + 1))
        axes.set_xticks(factors)
        axes.set_xlabel("factors")
        axes.set_ylabel("fitness")
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Creator": None, "Date": None})
        return text.getvalue()
