"""The report's tables: perplexities, for the screen too, and heat maps of fractions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean

from rich.table import Table

from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.masks import CROWDED
from prunevolve.search.population import Record
from prunevolve.search.summary import FactorWorth, Fractions, Summary, TaskResult, Winner

FOUND = "best found"
PERPLEXITY_HEADINGS = ("", "metric", "group", "size", "perplexity", "vs best found, nats/token")
RELATIVE_HEADINGS = ("task", "text", "dense", "best named", "", "best found", "relative rise")
FINALIST_HEADINGS = ("candidate", "loss", "vs best", "fitness", "size", "group", "metric")
FACTOR_HEADINGS = ("metric", "loss without it")
SHARED_HEADINGS = ("", "metric", "the best tenth", "the rest")
FRONT_HEADINGS = (
    *("size", "fitness", "less per node added", "perplexity on test"),
    *("group", "candidate", "metric"),
)
ANCESTOR_HEADINGS = ("candidate", "back", "parents", "fitness", "metric", "group")


def title_of(task: TaskResult) -> str:
    """Return one line that says what the perplexities were measured on."""
    text = task.perplexity_of
    rate = f"{task.sparsity:.0%} unstructured" if task.has_groups else task.pattern
    return (
        f"perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}"
    )


def perplexity_rows(task: TaskResult, best: Winner) -> list[tuple[str, ...]]:
    """Return the rows of a task's table: dense, then the others by perplexity, the best first."""
    perplexities = {FOUND: task.best.perplexity, **task.baselines}
    rows: list[tuple[str, ...]] = [("dense", "", "", "", f"{task.dense:.2f}", "")]
    for name, perplexity in sorted(perplexities.items(), key=lambda item: item[1]):
        if name == FOUND:
            text, group, size, behind = best.metric, best.group, best.size, ""
        else:
            known, gap = BASELINES[name].criterion, task.behind_best[name]
            text, group, size = known.text, known.group, known.metric.size
            behind = difference_text(gap.nats, gap.standard_error)
        group = group if task.has_groups else task.pattern
        rows.append((name, text, group, str(size), f"{perplexity:.2f}", behind))
    return rows


def relative_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Return the best found against the best named metric, by task and kind of text."""
    return [
        (
            task.name,
            result.text,
            f"{result.dense:.2f}",
            f"{result.named_perplexity:.2f}",
            result.named,
            f"{result.perplexity:.2f}",
            f"{result.relative_rise:.3f}",
        )
        for task in summary.tasks
        for result in task.by_text
    ]


def finalist_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Return the finalists on the selection text, best first."""
    return [
        (
            str(finalist.index),
            f"{finalist.selection_loss:.4f}",
            difference_text(finalist.difference, finalist.standard_error) if place else "–",
            f"{finalist.fitness:.4f}",
            str(finalist.size),
            finalist.group,
            finalist.metric,
        )
        for place, finalist in enumerate(summary.selection)
    ]


def ancestor_rows(ancestors: Sequence[tuple[int, Record]]) -> list[tuple[str, ...]]:
    """Return ancestors, each given with its distance in generations."""
    return [
        (
            str(record.index),
            str(distance),
            ", ".join(map(str, record.candidate.parents)),
            record.outcome.kind if record.fitness is None else f"{record.fitness:.4f}",
            record.criterion.text,
            record.criterion.group,
        )
        for distance, record in ancestors
    ]


def factor_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Return the winner's factors, and what it loses without each, the most first."""

    def lost(worth: FactorWorth) -> float:
        return math.inf if worth.difference is None else worth.difference

    return [
        (
            worth.factor,
            "cannot prune"
            if worth.difference is None
            else difference_text(worth.difference, worth.standard_error),
        )
        for worth in sorted(summary.factors, key=lost, reverse=True)
    ]


def difference_text(difference: float, standard_error: float | None) -> str:
    """Return a paired difference with its standard error, if it has one."""
    error = "" if standard_error is None else f" ± {standard_error:.4f}"
    return f"{difference:+.4f}{error}"


def screen_table(headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """Return a table for the screen, with numbers to the right."""
    table = Table()
    for heading in headings:
        is_text = heading in ("", "task", "text", "metric", "group")
        table.add_column(heading, overflow="fold", justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*row)
    return table


@dataclass(frozen=True)
class HeatMap:
    """A table of fractions whose cells are the darker the higher their value.

    Attributes:
        columns: The headings.
        rows: By name, a fraction for each column; None where there is none.
    """

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        values = [value for row in self.rows.values() for value in row if value is not None]
        return min(values), max(values)

    def shade(self, value: float) -> int:
        """Return how dark a cell is, from 10 for the lowest value to 100 for the highest."""
        low, high = self.limits
        return round(10 + 90 * (value - low) / (high - low)) if high > low else 10


def outcome_map(records: Sequence[Record], most: int = 12) -> HeatMap:
    """Return the share of each kind of outcome in at most `most` spans of candidates."""
    width = max(1, -(-len(records) // most))
    spans = [records[start : start + width] for start in range(0, len(records), width)]
    counts = [Counter(record.outcome.kind for record in span) for span in spans]
    kinds = [kind for kind, _ in sum(counts, Counter()).most_common()]
    rows = {kind: [count[kind] / count.total() or None for count in counts] for kind in kinds}
    return HeatMap("Outcomes", [str(span[0].index) for span in spans], rows)


def layer_maps(task: TaskResult) -> list[HeatMap]:
    """Return a task's zeros and mask overlaps: by block, by kind of matrix, and by layer."""
    zeros, overlap = _named(task.layers), _named(task.overlap)
    by_place = {(_kind(layer), _block(layer)): value for layer, value in zeros[FOUND].items()}
    blocks = list(dict.fromkeys(block for _, block in by_place))
    kinds = dict.fromkeys(kind for kind, _ in by_place)
    by_kind = {kind: [by_place.get((kind, block)) for block in blocks] for kind in kinds}
    return [
        *_means("Zeros", zeros),
        HeatMap("Zeros of the best found, layer by layer", blocks, by_kind),
        *_means("Mask overlap with the best found", overlap),
    ]


def _named(fractions: Fractions) -> Fractions:
    """Return the fractions of metrics that can prune the model, by the names that are shown."""
    return {
        FOUND if name == "best" else name: layers for name, layers in fractions.items() if layers
    }


def _means(title: str, fractions: Fractions) -> list[HeatMap]:
    """Return the means over layers: by block, and by kind of matrix."""
    maps = []
    for name, place in (("block", _block), ("kind of matrix", _kind)):
        values: dict[tuple[str, str], list[float]] = {}
        for metric, by_layer in fractions.items():
            for layer, value in by_layer.items():
                values.setdefault((metric, place(layer)), []).append(value)
        means = {key: mean(of_place) for key, of_place in values.items()}
        places = list(dict.fromkeys(key for _, key in means))
        rows = {metric: [means.get((metric, key)) for key in places] for metric in fractions}
        maps.append(HeatMap(f"{title}, by {name}", places, rows))
    return maps


def _block(layer: str) -> str:
    """Return a layer's block, which is the number in its name; a dash if it has none."""
    return next((part for part in layer.split(".") if part.isdecimal()), "–")


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def crowded(task: TaskResult) -> list[str]:
    """Return a warning about each metric's layers above `CROWDED`, the fullest first."""
    warnings = []
    for metric, layers in _named(task.layers).items():
        full = [(value, layer) for layer, value in layers.items() if value > CROWDED]
        full.sort(reverse=True)
        if full:
            names = ", ".join(f"{layer} ({value:.1%})" for value, layer in full[:8])
            count = "1 layer" if len(full) == 1 else f"{len(full)} layers"
            more = ", ..." if len(full) > 8 else ""
            warnings.append(f"{metric} leaves {count} above {CROWDED:.0%} zeros: {names}{more}")
    return warnings
