"""The report's charts as inline SVG.

Text, axes and grid take the colour of the page's text; every other colour is legible on white and
on black, and series differ in marker or dashes as well. A chart is 360 points wide, so that its
10-point text is legible on a phone. Figures are made without pyplot, which has global state.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from prunevolve.pruning.baselines import BASELINES
from prunevolve.search.population import Record
from prunevolve.search.report.tables import FOUND
from prunevolve.search.scale import Scale, unit_of
from prunevolve.search.summary import TaskResult

_INTERVAL = 2.0  # half-length of an error bar, in standard errors
_MOST_POINTS = 1000  # a point takes a hundred bytes
_OF_INTEREST = 3.0
"""How far above dense a fitness chart reaches, in rises of the best named metric."""

_INK = "#010203"
"""Drawn where the page puts its text colour."""

_BEST, _POINT, _DIM = "#d64b3c", "#4a86c5", "#87919c"

# The hues of Okabe and Ito (2008), which colour-blind readers can tell apart.
_SERIES = ("#2b86c5", "#d2691e", "#1a9873", "#bf6a9a", "#a1841a", "#4f9fd0", "#7a828e")
_MARKERS = "os^Dvph"
_DASHES = ((5, 1.5), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 1), (8, 2), (1, 1), (4, 1, 1, 1, 1, 1))

_STYLE: dict[str, object] = {
    "svg.fonttype": "none",  # text stays text: small, and searchable in the page
    "svg.hashsalt": "prunevolve",  # without it, the file differs each time
    "text.parse_math": False,  # a name with dollar signs is not a formula
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    """Yield a new figure of this height in inches, and its axes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        yield figure, figure.subplots()


def _element(figure: Figure, name: str, title: str, label: str) -> Markup:
    """Return a figure as an HTML element, described by `label`; `name` begins each id in it."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    svg = text.getvalue().partition("<svg")[2]
    # The style rule would apply to the whole page, which contains it once already.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # hundredths of a point are fine enough
    svg = re.sub(r"\n\s*", " ", svg).replace(_INK, "currentColor")
    head = '<figure><figcaption>{}</figcaption><svg role="img" aria-label="{}"'
    return Markup(head).format(title, label) + Markup(f"{svg}</figure>")


def perplexity_chart(name: str, task: TaskResult) -> Markup:
    """Draw a task's perplexities on its report text, with the errors of the paired differences."""
    best = task.best.perplexity
    errors = {named: gap.standard_error for named, gap in task.behind_best.items()}
    values = {**task.baselines, FOUND: best}
    values = dict(sorted(values.items(), key=lambda item: -item[1])) | {"dense": task.dense}
    with _drawing(0.9 + 0.27 * len(values)) as (figure, axes):
        axes.axvline(best, color=_BEST, linewidth=1.2, zorder=1.5)
        for place, (label, value) in enumerate(values.items()):
            low, high = (math.exp(sign * _INTERVAL * (errors.get(label) or 0)) for sign in (-1, 1))
            axes.errorbar(
                [value],
                [place],
                xerr=[[value - value * low], [value * high - value]],
                fmt={"dense": "D", FOUND: "*"}.get(label, "o"),
                markersize=10 if label == FOUND else 5,
                capsize=3,
                elinewidth=1.4,
                color=_BEST if label == FOUND else _INK,
            )
        labels = [f"{label}  {value:.2f}" for label, value in values.items()]
        axes.set_yticks(range(len(values)), labels)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xscale("log")  # differences in loss are ratios of perplexity
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set_xlabel("perplexity, logarithmic")
        numbers = ", ".join(f"{label} {value:.2f}" for label, value in reversed(values.items()))
        return _element(figure, name, "Perplexity on the test text", numbers)


def fitness_chart(name: str, evaluated: Sequence[Record], scale: Scale) -> Markup:
    """Draw the fitness of evaluated candidates in the order of breeding, and the best so far."""
    places = [record.index for record in evaluated]
    fitness = [record.rank[0] for record in evaluated]
    best = list(accumulate(fitness, min))
    with _drawing(4.2) as (figure, axes):
        _set_fitness_axis(axes, fitness, scale)
        every = math.ceil(len(evaluated) / _MOST_POINTS)
        label = "evaluated" if every == 1 else f"evaluated, 1 of {every}"
        axes.plot(places[::every], fitness[::every], "o", ms=4, mew=0, color=_POINT, label=label)
        # Below the points, so that those of the candidates that set the record stay visible.
        axes.step(places, best, where="post", color=_BEST, zorder=1.5, label="best so far")
        for number, (named, value) in enumerate(scale.named_fitness.items()):
            axes.axhline(
                value,
                color=_SERIES[number % len(_SERIES)],
                linewidth=1.1,
                linestyle=(0, _DASHES[number % len(_DASHES)]),
                zorder=1,
                label=named,
            )
        axes.set_xlabel("candidates bred")
        figure.legend(loc="outside upper center", ncols=3)
        steps = f"the best falls from {best[0]:.4f} to {best[-1]:.4f}"
        title = "Fitness against candidates bred"
        return _element(figure, name, title, steps + _references(scale))


def front_chart(
    name: str, best: Sequence[Record], front: Sequence[Record], trade_off: Record, scale: Scale
) -> Markup:
    """Draw the best fitness of each size, the Pareto front, and the named metrics by size."""
    with _drawing(4.2) as (figure, axes):
        _set_fitness_axis(axes, [record.rank[0] for record in best], scale)
        sizes, fitness = _points_of([record for record in best if record not in front])
        axes.plot(sizes, fitness, "o", markersize=3, color=_DIM, label="best of its size")
        sizes, fitness = _points_of(front)
        axes.step(sizes, fitness, "o-", where="post", ms=5, color=_BEST, label="Pareto front")
        sizes, fitness = _points_of([trade_off])
        axes.plot(sizes, fitness, "o", ms=13, mfc="none", color=_BEST, label="best trade-off")
        for number, (named, value) in enumerate(scale.named_fitness.items()):
            if named in BASELINES:
                axes.plot(
                    [BASELINES[named].criterion.metric.size],
                    [value],
                    _MARKERS[number % len(_MARKERS)],
                    markersize=7,
                    markerfacecolor="none",
                    markeredgewidth=1.5,
                    color=_SERIES[number % len(_SERIES)],
                    label=named,
                )
        axes.set_xlabel("size, nodes")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        figure.legend(loc="outside upper center", ncols=3)
        steps = "; ".join(f"{record.size} nodes {record.fitness:.4f}" for record in front)
        return _element(figure, name, "Fitness against size", steps + _references(scale))


def _points_of(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [record.size for record in records], [record.rank[0] for record in records]


def _references(scale: Scale) -> str:
    """Return dense and the named metrics with their fitness, best first."""
    known = {"dense": scale.dense_fitness, **scale.named_fitness}
    ordered = sorted(known, key=lambda name: known[name])
    return "".join(f"; {name} {known[name]:.4f}" for name in ordered)


def _set_fitness_axis(axes: Axes, values: Sequence[float], scale: Scale) -> None:
    """Set up a fitness axis with a line for the dense model.

    It leaves out hopeless values, far above the best named metric: otherwise the line of the best
    would look flat. Their number is said in the label.
    """
    dense, named = scale.dense_fitness, list(scale.named_fitness.values())
    low = min(dense, *values, *named)
    # Keep the fittest candidate off the very edge, however bad it is.
    least_top = low + 1.3 * (min(values) - low)
    limit = max(dense + _OF_INTEREST * (min(named) - dense), least_top)
    top = max(least_top, *(value for value in (dense, *values, *named) if value <= limit))
    margin = 0.05 * (top - low) or 0.01
    above = sum(value > limit for value in values)
    axes.axhline(dense, color=_INK, linewidth=0.9, zorder=1, label="dense")
    note = f" ({above} above the chart)" if above else ""
    axes.set_ylabel(f"fitness, {unit_of(len(scale.cells))}{note}")
    axes.set_ylim(low - margin, top + margin)
