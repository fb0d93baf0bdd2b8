"""The report's section on layers: zeros and mask overlap by block, by kind of matrix, by layer."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from search.report.charts import BEST, Chart, lines_chart, map_chart

CROWDED = 0.9
"""Fraction of zeros above which the report warns: the layer's output depends on few weights."""

Layers = Mapping[str, Mapping[str, float]]
"""A fraction for each layer, by metric."""


def layers(name: str, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return one task's charts and tables of masks by layer, and its warnings; None if unmeasured.

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
        drawn.append(map_chart(f"{name}-map", "Zeros of the best found, layer by layer", cells))
    if overlap := task.get("overlap"):
        drawn += by_place(f"{name}-overlap", "Mask overlap with the best found", overlap)
    tables = {"Zeros of every layer": table_by_layer(zeros)}
    if overlap:
        tables["Mask overlap with the best found, every layer"] = table_by_layer(overlap)
    return {"charts": drawn, "tables": tables, "crowded": crowded(zeros)}


def by_place(name: str, title: str, fractions: Layers) -> list[Chart]:
    """Return two charts of the mean over layers: by block, and by kind of matrix."""
    blocks, kinds = (
        {metric: _means(by_layer, part) for metric, by_layer in fractions.items()}
        for part in (0, 1)
    )
    drawn = [lines_chart(f"{name}-kind", f"{title}, by kind of matrix", "kind", kinds)]
    if any(blocks.values()):
        drawn.insert(0, lines_chart(f"{name}-block", f"{title}, by block", "block", blocks))
    return drawn


def place(layer: str) -> tuple[int | None, str]:
    """Return a layer's block, which is the number in its name, and its kind, the last part."""
    parts = layer.split(".")
    return next((int(part) for part in parts if part.isdecimal()), None), parts[-1]


def crowded(zeros: Layers) -> dict[str, list[tuple[str, float]]]:
    """Return each metric's layers with a fraction of zeros above `CROWDED`, the highest first."""
    warnings = {
        metric: sorted(
            ((layer, value) for layer, value in fractions.items() if value > CROWDED),
            key=lambda pair: -pair[1],
        )
        for metric, fractions in zeros.items()
    }
    return {metric: layers for metric, layers in warnings.items() if layers}


def table_by_layer(fractions: Layers) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows: one row per layer, one column per metric, in percent."""
    columns = fractions.values()
    names = list(dict.fromkeys(layer for column in columns for layer in column))
    rows = [
        (layer, *(f"{column[layer]:.2%}" if layer in column else "" for column in columns))
        for layer in names
    ]
    return ("layer", *fractions), rows


def _means(fractions: Mapping[str, float], part: int) -> dict[Any, float]:
    """Return the mean fraction at each block (part 0) or of each kind (part 1)."""
    groups: dict[Any, list[float]] = {}
    for layer, fraction in fractions.items():
        key = place(layer)[part]
        if key is not None:
            groups.setdefault(key, []).append(fraction)
    return {key: mean(values) for key, values in groups.items()}
