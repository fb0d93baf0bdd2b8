"""What report.html shows, section by section: the charts and tables made of a run's files."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from pruning.latex import to_latex
from pruning.leaves import LEAVES
from pruning.metric import Metric
from search.population import Record, best_of_each_size, pareto_front
from search.report import charts, history
from search.report.charts import BEST, Chart
from search.report.drawing import formula_svg, tree_svg

CROWDED = 0.9
"""Fraction of zeros above which a layer is warned of: its output hangs on few weights."""

Layers = Mapping[str, Mapping[str, float]]
"""For each metric a fraction for each layer."""


def formula(name: str, metric: str) -> dict[str, Any]:
    """Return a metric in three forms: drawn, LaTeX, text; `name` is unique in the page."""
    parsed = Metric.parse(metric)
    return {"svg": formula_svg(name, parsed), "latex": to_latex(parsed), "text": metric}


def winner(metric: str) -> dict[str, Any]:
    """Return the best metric's formula, its tree, and what its leaves mean."""
    parsed = Metric.parse(metric)
    return {
        **formula("winner", metric),
        "tree": tree_svg("tree", parsed),
        "leaves": {name: LEAVES[name].meaning for name in sorted(parsed.leaves)},
    }


def progress(
    records: Sequence[Record], timings: Mapping[int, Mapping[str, Any]], scale: str
) -> list[Chart]:
    """Return the charts of fitness against candidates and, if it was noted, against time."""
    indices = range(len(records))
    axis = "candidates bred"
    drawn = [charts.fitness_chart("candidates", records, indices, "candidate", axis, scale)]
    seconds = history.elapsed_seconds(len(records), timings)
    if any(seconds):
        unit, length = next(
            (unit, length)
            for unit, length in (("hours", 3600), ("minutes", 60), ("seconds", 1))
            if seconds[-1] >= 2 * length or length == 1
        )
        axis = f"{unit}, estimated: busy time of the workers / their number"
        places = [value / length for value in seconds]
        drawn.append(charts.fitness_chart("time", records, places, axis, unit, scale))
    return drawn


def breeding(records: Sequence[Record]) -> list[Chart]:
    """Return the charts of outcomes and of leaf and operator frequencies over the candidates."""
    spans = history.bins(len(records))
    leaves, operators = history.shares_by_bin(records, spans)
    drawn = [
        charts.outcomes_chart("outcomes", history.outcomes_by_bin(records, spans), spans),
        charts.shares_chart("leaves", "Bred metrics that contain a leaf", leaves, spans),
    ]
    if operators:
        title = "Bred metrics that contain an operator"
        drawn.append(charts.shares_chart("operators", title, operators, spans))
    return drawn


def front(records: Sequence[Record], scale: str) -> dict[str, Any]:
    """Return the chart of fitness against size, and the metrics on the Pareto front."""
    members = pareto_front(records)
    best = best_of_each_size(records)
    return {
        "chart": charts.front_chart("front", best, members, scale),
        "members": [(one, formula(f"front{one.index}", one.criterion.text)) for one in members],
    }


def lineage(records: Sequence[Record], best: Mapping[str, Any]) -> list[tuple[int, Record]]:
    """Return the winner and its ancestors with their distance in generations."""
    wanted = ("evaluated", best["metric"], best["group"])
    for record in records:
        if (record.outcome.kind, record.criterion.text, record.criterion.group) == wanted:
            return history.ancestry(records, record)
    return []


def layers(name: str, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the charts of one task's masks by layer and its warnings; None if not measured.

    Args:
        name: Unique in the page.
    """
    if not task.get("layers"):
        return None
    zeros = {
        BEST if metric == "best" else metric: fractions
        for metric, fractions in task["layers"].items()
    }
    drawn = by_place(f"{name}-zeros", "Zeros", zeros)
    cells = {
        (kind, block): fraction
        for layer, fraction in zeros.get(BEST, {}).items()
        for block, kind in [place(layer)]
        if block is not None
    }
    if cells:
        drawn.append(
            charts.map_chart(f"{name}-map", "Zeros of the best found, layer by layer", cells)
        )
    if overlap := task.get("overlap"):
        drawn += by_place(f"{name}-overlap", "Mask overlap with the best found", overlap)
    tables = {"Zeros of every layer": table_by_layer(zeros)}
    if overlap:
        tables["Mask overlap with the best found, every layer"] = table_by_layer(overlap)
    return {"charts": drawn, "tables": tables, "crowded": crowded(zeros)}


def by_place(name: str, title: str, fractions: Layers) -> list[Chart]:
    """Return two charts of the mean over layers: by block, and by kind of matrix."""
    blocks, kinds = (
        {metric: _means(found, part) for metric, found in fractions.items()} for part in (0, 1)
    )
    drawn = [charts.lines_chart(f"{name}-kind", f"{title}, by kind of matrix", "kind", kinds)]
    if any(blocks.values()):
        drawn.insert(0, charts.lines_chart(f"{name}-block", f"{title}, by block", "block", blocks))
    return drawn


def place(layer: str) -> tuple[int | None, str]:
    """Return a layer's block, which is the number in its name, and its kind, the last part."""
    parts = layer.split(".")
    return next((int(part) for part in parts if part.isdecimal()), None), parts[-1]


def crowded(zeros: Layers) -> dict[str, list[tuple[str, float]]]:
    """Return for each metric the layers with more zeros than `CROWDED`, fullest first."""
    found = {
        metric: sorted(
            ((layer, value) for layer, value in fractions.items() if value > CROWDED),
            key=lambda pair: -pair[1],
        )
        for metric, fractions in zeros.items()
    }
    return {metric: layers for metric, layers in found.items() if layers}


def table_by_layer(fractions: Layers) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows: one row a layer, one column a metric, in percent."""
    names = list(dict.fromkeys(layer for found in fractions.values() for layer in found))
    rows = [
        (layer, *(f"{found[layer]:.2%}" if layer in found else "" for found in fractions.values()))
        for layer in names
    ]
    return ("layer", *fractions), rows


def _means(fractions: Mapping[str, float], part: int) -> dict[Any, float]:
    """Return the mean fraction at each block (part 0) or of each kind (part 1)."""
    found: dict[Any, list[float]] = {}
    for layer, fraction in fractions.items():
        where = place(layer)[part]
        if where is not None:
            found.setdefault(where, []).append(fraction)
    return {where: mean(values) for where, values in found.items()}
