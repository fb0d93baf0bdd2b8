"""The report's charts of fitness, with the dense model and the named metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean, quantiles
from typing import Any

import matplotlib

from search.population import Record
from search.report.charts import (
    MARKERS,
    SERIES,
    STYLE,
    Chart,
    figure_of,
    legend,
    svg_of,
    whole_ticks,
)
from search.report.palette import LIGHT

_OF_INTEREST = 3.0
"""How far above dense a fitness chart reaches, in rises of the best named metric."""


@dataclass(frozen=True)
class References:
    """The fitness values to compare a candidate with.

    Attributes:
        dense: Fitness of the dense model; None if unknown.
        named: Fitness of each named metric for which it is known.
        sizes: Number of nodes of each named metric that has a formula.
    """

    dense: float | None = None
    named: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All references with their fitness, best first, as the end of a sentence."""
        known = dict(sorted(self.named.items(), key=lambda item: item[1]))
        if self.dense is not None:
            known = {"dense": self.dense, **known}
        return "".join(f"; {name} {value:.4f}" for name, value in known.items())


def fitness_chart(
    name: str,
    records: Sequence[Record],
    places: Sequence[float],
    axis: str,
    unit: str,
    scale: str,
    references: References,
) -> Chart:
    """Draw fitness along an axis: each evaluated candidate, and the best so far.

    Args:
        places: Each record's position on the axis.
        axis: The label of the axis.
        unit: The column heading of the positions.
        scale: The unit of fitness.
    """
    shown = [(places[r.index], r.index, r.fitness) for r in records if r.fitness is not None]
    best = list(accumulate((fitness for _, _, fitness in shown), min))
    across = [place for place, _, _ in shown]
    title = f"Fitness against {unit}"
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(3.4)
        values = [fitness for _, _, fitness in shown]
        limits = _limits(values, references)
        _scatter(axes, across, values, limits, "evaluated", LIGHT["point"])
        # Below the points, so that those of the candidates that set the record stay visible.
        axes.plot(
            across,
            best,
            drawstyle="steps-post",
            color=LIGHT["best"],
            zorder=1.5,
            lw=1.8,
            label="best so far",
        )
        axes.set(xlabel=axis, ylabel=f"fitness, {scale}", ylim=limits)
        axes.set_xlim(-0.02 * places[-1] or None, 1.02 * places[-1] or None)
        if axis == "candidate":
            whole_ticks(axes.xaxis)
        _reference_lines(axes, references, limits)
        legend(figure, 3)
        description = f"{title}: {len(shown)} evaluated candidates" + (
            f"; the best falls from {best[0]:.4f} to {best[-1]:.4f}" if best else ""
        )
        svg = svg_of(figure, name, description + references.text)
    rows = [
        (str(index), f"{place:.6g}", f"{fitness:.4f}", f"{least:.4f}")
        for (place, index, fitness), least in zip(shown, best, strict=True)
    ]
    return Chart(title, svg, ("candidate", unit, "fitness", "best so far"), rows)


def front_chart(
    name: str,
    best: Sequence[Record],
    front: Sequence[Record],
    trade_off: Record | None,
    scale: str,
    references: References,
) -> Chart:
    """Draw the best fitness of each size, the Pareto front, and the named metrics by size."""
    title = "Fitness against size"
    named = {n: f for n, f in references.named.items() if n in references.sizes}
    with matplotlib.rc_context(STYLE):
        figure, axes = figure_of(4.0)
        limits = _limits([r.fitness for r in best if r.fitness is not None], references)
        dominated = [r for r in best if r not in front]
        _scatter(axes, *_points_of(dominated), limits, "best of its size", LIGHT["dim"])
        sizes, fitness = _points_of(front)
        axes.plot(
            sizes,
            fitness,
            "o-",
            drawstyle="steps-post",
            color=LIGHT["best"],
            markersize=5,
            label="Pareto front",
        )
        axes.set(xlabel="size, nodes", ylabel=f"fitness, {scale}", ylim=limits)
        if trade_off is not None:
            axes.plot(
                *_points_of([trade_off]),
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=LIGHT["best"],
                markeredgewidth=1.5,
                linestyle="",
                label="best trade-off",
            )
        for number, (label, value) in enumerate(named.items()):
            if value <= limits[1]:
                axes.plot(
                    [references.sizes[label]],
                    [value],
                    MARKERS[number % len(MARKERS)],
                    markersize=7,
                    markerfacecolor="none",
                    markeredgewidth=1.5,
                    linestyle="",
                    color=SERIES[number % len(SERIES)],
                    label=label,
                )
        dense = References(references.dense, _without_size(references))
        _reference_lines(axes, dense, limits)
        whole_ticks(axes.xaxis)
        legend(figure, 3)
        svg = svg_of(figure, name, f"{title}: the front{_front_text(front)}{references.text}")
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
    rows += [(str(references.sizes[n]), f"{f:.4f}", "", n, "") for n, f in named.items()]
    return Chart(title, svg, ("size", "fitness", "on the front", "candidate", "metric"), rows)


def _limits(values: Sequence[float], references: References) -> tuple[float, float]:
    """Return the limits of a fitness axis.

    They leave out hopeless values: those far above the best named metric if it is known, else the
    worst tenth once there are many. Otherwise the line of the best would look flat.
    """
    known = [*values, *references.named.values()]
    if references.dense is not None:
        known.append(references.dense)
    low, top = min(known), max(known)
    if references.dense is not None and references.named:
        rise = min(references.named.values()) - references.dense
        # Keep the fittest candidate off the very edge, however bad it is.
        least_top = low + 1.3 * (min(values) - low)
        limit = max(references.dense + _OF_INTEREST * rise, least_top)
        top = max(least_top, *(value for value in known if value <= limit))
    elif len(values) >= 50:
        top = max(values[0], quantiles(values, n=10)[-1])
    margin = 0.05 * (top - low) or 0.01
    return low - margin, top + margin


def _scatter(
    axes: Any,
    across: Sequence[float],
    values: Sequence[float],
    limits: tuple[float, float],
    label: str,
    colour: str,
) -> None:
    """Draw points, and those above the limits as arrows at the upper edge."""
    inside = [(x, y) for x, y in zip(across, values, strict=True) if y <= limits[1]]
    above = [x for x, y in zip(across, values, strict=True) if y > limits[1]]
    axes.scatter(*(zip(*inside, strict=True) if inside else ([], [])), s=9, c=colour, label=label)
    if above:
        edge = [limits[1] - 0.015 * (limits[1] - limits[0])] * len(above)
        axes.scatter(
            above,
            edge,
            s=12,
            c="none",
            edgecolors=colour,
            marker="^",
            linewidths=0.8,
            label=f"{len(above)} above the chart",
        )


def _reference_lines(axes: Any, references: References, limits: tuple[float, float]) -> None:
    """Draw a horizontal line for each reference, named on the right; names never overlap."""
    lines = {} if references.dense is None else {"dense": references.dense}
    lines |= sorted(references.named.items(), key=lambda item: item[1])
    low, high = limits
    heights = [(min(value, high) - low) / (high - low) for value in lines.values()]
    places = spread(heights)
    for (name, value), height, place in zip(lines.items(), heights, places, strict=True):
        in_range = value <= high
        if in_range:
            axes.axhline(
                value,
                color=LIGHT["ink"] if name == "dense" else LIGHT["edge"],
                linewidth=0.9,
                linestyle="-" if name == "dense" else (0, (4, 2)),
                zorder=1,
            )
        axes.annotate(
            name if in_range else f"{name} ↑",
            (1, height),
            (1.07, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": LIGHT["edge"], "linewidth": 0.7, "shrinkA": 0}
            if in_range
            else None,
        )


def spread(heights: Sequence[float], apart: float = 0.065) -> list[float]:
    """Return positions from 0 to 1 for labels: far enough apart, each as near its line as possible.

    Args:
        heights: The lines' positions, ascending, from 0 to 1; no more than there is room for.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1], apart) < _lowest(
            groups[-2], apart
        ) + apart * len(groups[-2]):
            upper = groups.pop()
            groups[-1] += upper
    return [_lowest(group, apart) + apart * i for group in groups for i in range(len(group))]


def _lowest(group: Sequence[float], apart: float) -> float:
    """Return the lowest position in a group of labels that is centred on its lines."""
    height = apart * (len(group) - 1)
    return min(max(fmean(group) - height / 2, 0.0), 1.0 - height)


def _points_of(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [r.size for r in records], [r.fitness for r in records if r.fitness is not None]


def _without_size(references: References) -> dict[str, float]:
    return {n: f for n, f in references.named.items() if n not in references.sizes}


def _front_text(front: Sequence[Record]) -> str:
    return "".join(f"; {r.size} nodes {r.fitness:.4f}" for r in front)
