"""The report's chart of perplexities: the dense model, the named metrics and the best found."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from search.report.charts import BEST, STYLE, Chart, figure_of, svg_of
from search.report.palette import LIGHT

INTERVAL = 2.0
"""Half-length of an error bar, in standard errors."""


def perplexity_chart(name: str, title: str, task: Mapping[str, Any]) -> Chart:
    """Draw a task's perplexities on its report text, with the errors of the paired differences.

    Args:
        task: With `dense`, `baselines`, `best` and `behind_best`, as in `summary.json`.
    """
    best = task["best"]["perplexity"]
    worst_first = sorted(task["baselines"].items(), key=lambda item: -item[1])
    rows = [
        (label, value, task["behind_best"].get(label, {}).get("standard_error"))
        for label, value in worst_first
    ]
    rows += [(BEST, best, None)]
    rows.sort(key=lambda row: -row[1])
    rows += [("dense", task["dense"], None)]
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(0.9 + 0.27 * len(rows))
        axes.axvline(best, color=LIGHT["best"], linewidth=1.2, zorder=1.5)
        for place, (label, value, error) in enumerate(rows):
            ends = [value * math.exp(sign * INTERVAL * (error or 0)) for sign in (-1, 1)]
            axes.errorbar(
                [value],
                [place],
                xerr=[[value - ends[0]], [ends[1] - value]],
                fmt={"dense": "D", BEST: "*"}.get(label, "o"),
                markersize=10 if label == BEST else 5,
                capsize=3,
                elinewidth=1.4,
                color=LIGHT["best"] if label == BEST else LIGHT["ink"],
            )
        values = [value for _, value, _ in rows]
        axes.set_yticks(range(len(rows)), [f"{label}  {value:.2f}" for label, value, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        _perplexity_axis(axes, min(values), max(values))
        values_text = ", ".join(f"{label} {value:.2f}" for label, value, _ in reversed(rows))
        svg = svg_of(figure, name, f"{title}: {values_text}")
    numbers = [(label, f"{value:.4f}", _error_text(error)) for label, value, error in rows]
    headings = ("", "perplexity", "standard error of the difference to the best found, nats/token")
    note = (
        f"Bars span ±{INTERVAL:g} standard errors of the paired difference to the best found; "
        "where they cross its line, the difference may be due to chance."
    )
    return Chart(title, svg, headings, numbers, note)


def _perplexity_axis(axes: Any, least: float, most: float) -> None:
    """Make the horizontal axis logarithmic: differences in loss are ratios of perplexity."""
    axes.set_xscale("log")
    if most < 8 * least:
        steps = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(least, most)
    else:
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        steps = [factor * 10.0**power for power in powers for factor in (1, 3)]
    ticks = [tick for tick in steps if 0.95 * least <= tick <= 1.05 * most]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.set_xlabel("perplexity, logarithmic")


def _error_text(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"
