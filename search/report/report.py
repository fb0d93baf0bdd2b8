"""report.html: one white page with a chart and tables, without scripts or requests."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.statistics import LEAVES
from prunevolve.search.ablation import shared_by_the_best
from prunevolve.search.population import Record, pareto_front
from prunevolve.search.verdict import best_of_the_baselines, verdict_of

FOUND = "best found"


@dataclass(frozen=True)
class Table:
    """A table with its headings; numbers come before formulas, which are last, under `metric`."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def render(
    config: Config,
    records: Sequence[Record],
    summary: JsonObject | None,
    environment: JsonObject,
    ended: str,
    commands: tuple[str, str],
    chart: str,
) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far.

    Args:
        records: The journal; at least one candidate is evaluated.
        summary: None before the run ends.
        environment: As in `environment.json`.
        ended: When the last candidate's outcome was written, ISO 8601.
        commands: How to apply the best metric, and how to breed more candidates.
        chart: The chart of the run, an SVG document.
    """
    page = (Path(__file__).parent / "report.html.j2").read_text("utf-8")
    template = Template(
        page, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    evaluated = [record for record in records if record.fitness is not None]
    winner = min(evaluated, key=lambda record: record.rank)
    if summary and summary["selection"]:
        winner = records[summary["selection"][0]["index"]]
    return template.render(
        config=config,
        yaml=schema.to_yaml(config),
        records=records,
        outcomes=Counter(record.outcome.kind for record in records).most_common(),
        summary=summary,
        environment=environment,
        ended=ended.replace("T", " ").replace("+00:00", " UTC"),
        commands=commands,
        chart=chart[chart.index("<svg") :],
        winner=winner,
        statistics={name: LEAVES[name].meaning for name in sorted(winner.criterion.metric.leaves)},
        front=front_table(evaluated),
        shared=Table(("", "the best tenth", "the rest", "part"), shared_by_the_best(records)),
        **{function.__name__: function for function in _FOR_THE_SUMMARY},
    )


# The tables


def title_of(task: JsonObject) -> str:
    """Return one line that says what the perplexities were measured on."""
    text, rate = task["perplexity_of"], f"{task['sparsity']:.0%} unstructured"
    if task["pattern"] != "unstructured":
        rate = task["pattern"]
    return (
        f"perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}"
    )


def perplexity_table(task: JsonObject, best: JsonObject) -> Table:
    """Return a task's perplexities: dense, then the others, the best first."""
    rows = [("dense", f"{task['dense']:.2f}", "", "", "")]
    perplexities = {FOUND: task["best"]["perplexity"], **task["baselines"]}
    for name, perplexity in sorted(perplexities.items(), key=lambda item: item[1]):
        if name == FOUND:
            criterion, behind = Criterion.parse(best["metric"], best["group"]), ""
        else:
            criterion = BASELINES[name].criterion
            behind = _gap(task["behind_best"][name], "nats")
        # An n:m pattern has its own group.
        group = criterion.group if task["pattern"] == "unstructured" else task["pattern"]
        rows.append((name, f"{perplexity:.2f}", behind, group, criterion.metric.infix))
    return Table(("", "perplexity", "vs best found, nats/token", "group", "metric"), rows)


def relative_table(tasks: Sequence[JsonObject]) -> Table:
    """Return the best found against the best baseline, by task and kind of text."""
    rows = [
        (
            *(task["name"], cell["text"], f"{cell['dense']:.2f}"),
            *(f"{cell['named_perplexity']:.2f}", cell["named"]),
            *(f"{cell['perplexity']:.2f}", f"{cell['relative_rise']:.3f}"),
        )
        for task in tasks
        for cell in task["by_text"]
    ]
    headings = ("task", "text", "dense", "best baseline", "", FOUND, "relative loss increase")
    return Table(headings, rows)


def finalist_table(finalists: Sequence[JsonObject]) -> Table:
    """Return the finalists on the selection text, best first."""
    rows = [
        (
            *(str(finalist["index"]), f"{finalist['selection_loss']:.4f}"),
            _gap(finalist, "difference") if place else "–",
            *(f"{finalist['fitness']:.4f}", finalist["group"]),
            Metric.parse(finalist["metric"]).infix,
        )
        for place, finalist in enumerate(finalists)
    ]
    return Table(("candidate", "loss", "vs best", "fitness", "group", "metric"), rows)


def factor_table(factors: Sequence[JsonObject]) -> Table:
    """Return what the winner loses without each of its factors, the most first."""

    def cost(factor: JsonObject) -> float:
        return math.inf if factor["difference"] is None else float(factor["difference"])

    rows = [
        (_gap(factor, "difference"), Metric.parse(factor["factor"]).infix)
        for factor in sorted(factors, key=cost, reverse=True)
    ]
    return Table(("loss without it", "metric"), rows)


def front_table(evaluated: Sequence[Record]) -> Table:
    """Return the candidates that no smaller one equals or beats, by size."""
    rows = [
        (str(r.size), f"{r.rank[0]:.4f}", str(r.index), r.criterion.metric.infix)
        for r in pareto_front(evaluated)
    ]
    return Table(("size", "fitness", "candidate", "metric"), rows)


def _gap(gap: JsonObject, name: str) -> str:
    """Return a paired difference with its standard error, if it has one."""
    if gap[name] is None:
        return "cannot prune"
    error = gap["standard_error"]
    return f"{gap[name]:+.4f}" + ("" if error is None else f" ± {error:.4f}")


_FOR_THE_SUMMARY = (
    *(best_of_the_baselines, verdict_of, title_of, perplexity_table, relative_table),
    *(finalist_table, factor_table),
)
"""What the template calls where there is a summary."""
