"""The sections of report.html: charts and tables made from a run's files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pruning.baselines import BASELINES
from pruning.latex import to_latex
from pruning.leaves import LEAVES
from pruning.metric import Metric
from search.population import Record, best_of_each_size, pareto_front
from search.report import charts, history
from search.report.charts import Chart
from search.report.drawing import formula_svg, tree_svg
from search.report.fitness_charts import (
    References,
    fitness_chart,
    front_chart,
)
from search.report.perplexity_chart import perplexity_chart
from search.report.run import Run
from search.scale import Scale

BAD_TRADE = 1.5
"""Multiple of the lowest rise over dense beyond which no metric, however small, is a trade-off."""

NEAR = 2
"""Generations of ancestors that are shown unfolded."""


def formula(name: str, metric: str) -> dict[str, Any]:
    """Return a metric in three forms, SVG, LaTeX and text; `name` must be unique in the page."""
    parsed = Metric.parse(metric)
    return {"svg": formula_svg(name, parsed), "latex": to_latex(parsed), "text": metric}


def winner(metric: str) -> dict[str, Any]:
    """Return the best metric's formula, its tree, and the meaning of its leaves."""
    parsed = Metric.parse(metric)
    return {
        **formula("winner", metric),
        "tree": tree_svg("tree", parsed),
        "leaves": {name: LEAVES[name].meaning for name in sorted(parsed.leaves)},
    }


def title(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return the page title, from each task's `model`, `sparsity` and `pattern`."""
    models = dict.fromkeys(task["model"] for task in tasks if task.get("model"))
    rates = dict.fromkeys(
        f"{task['sparsity']:.0%}" if task["pattern"] == "unstructured" else task["pattern"]
        for task in tasks
    )
    on_models = f" for {_and(list(models))}" if models else ""
    at_rates = f" at {_and(list(rates))}" if rates else ""
    return f"Search for a pruning metric{on_models}{at_rates}"


def state(run: Run) -> str:
    """Return a sentence on what the report does not cover; empty if it covers the whole run."""
    done = len(run.records)
    if not run.summary:
        return (
            f"This run has not ended: the report shows its first {done} candidates. Nothing has "
            "been measured on the report text yet, so there is no verdict."
        )
    if run.summary["candidates"] < done:
        return (
            "This run was extended after it ended: results on the selection and report texts cover "
            f"the first {run.summary['candidates']} candidates, everything else covers {done}."
        )
    return ""


def facts(run: Run) -> dict[str, str]:
    """Return the facts about the run: candidates, seed, date, time, versions, machine."""
    kinds = Counter(record.outcome.kind for record in run.records)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    entries = {"Candidates": f"{len(run.records)}: {outcomes}" if outcomes else "none"}
    if run.seed is not None:
        entries["Seed"] = str(run.seed)
    if run.ended:
        entries["Last candidate"] = run.ended.replace("T", " ").replace("+00:00", " UTC")
    if run.summary:
        entries["Time"] = f"{run.summary['seconds']} s in the run's last process"
    if packages := run.environment.get("packages"):
        versions = {"Python": run.environment.get("python", ""), **packages}
        entries["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        devices = run.environment.get("cuda") or []
        machine = [f"{run.environment.get('cores')} cores", *devices]
        entries["Machine"] = ", ".join([*machine, run.environment.get("platform", "")])
    return entries


def aggregate(run: Run) -> str:
    """Return how the rises of several cells are aggregated; empty if there is a single cell."""
    if run.scale:
        return run.scale.aggregate if len(run.scale.cells) > 1 else ""
    cells = sum(len(task.get("by_text", ())) for task in run.summary.get("tasks", ()))
    return str(run.summary.get("aggregate", "mean")) if cells > 1 else ""


def references(scale: Scale | None) -> References:
    """Return the fitness of the dense model and the named metrics, as far as it was saved."""
    if scale is None:
        return References()
    sizes = {name: known.criterion.metric.size for name, known in BASELINES.items()}
    return References(scale.dense_fitness, scale.named_fitness, sizes)


def perplexities(name: str, task: Mapping[str, Any]) -> Chart:
    """Return the chart of one task's perplexities on its report text."""
    return perplexity_chart(name, "Perplexity on the report text", task)


def best_so_far(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the fittest record in the form of `summary.json`; None if none was evaluated."""
    measured = [record for record in records if record.fitness is not None]
    if not measured:
        return None
    best = min(measured, key=lambda record: record.rank)
    text, group = best.criterion.text, best.criterion.group
    return {"metric": text, "group": group, "size": best.size, "fitness": best.fitness}


def progress(
    records: Sequence[Record],
    timings: Mapping[int, Mapping[str, Any]],
    scale: str,
    known: References,
) -> list[Chart]:
    """Return the charts of fitness against candidates and, if it was recorded, against time."""
    if not any(record.fitness is not None for record in records):
        return []
    indices = range(len(records))
    axis = "candidates bred"
    drawn = [fitness_chart("candidates", records, indices, "candidate", axis, scale, known)]
    seconds = history.elapsed_seconds(len(records), timings)
    if any(seconds):
        unit, length = next(
            (unit, length)
            for unit, length in (("hours", 3600), ("minutes", 60), ("seconds", 1))
            if seconds[-1] >= 2 * length or length == 1
        )
        axis = f"{unit} (busy time / workers)"
        places = [value / length for value in seconds]
        drawn.append(fitness_chart("time", records, places, axis, unit, scale, known))
    return drawn


def breeding(records: Sequence[Record]) -> list[Chart]:
    """Return the charts of outcomes and of leaf and operator frequencies over the candidates."""
    if not records:
        return []
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


def front(
    records: Sequence[Record],
    unit: str,
    known: References,
    scale: Scale | None,
    tasks: Sequence[Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Return the chart of fitness against size, and the metrics on the Pareto front.

    Each member has its record, its formula, its fall in fitness per node added since the previous
    member, whether it is the best trade-off, and its perplexity on each task's report text (None
    where it was not measured). Returns None if nothing was evaluated.
    """
    members = pareto_front(records)
    if not members:
        return None
    falls = falls_per_node(members)
    chosen = trade_off(members, scale)
    drawn = front_chart("front", best_of_each_size(records), members, chosen, unit, known)
    return {
        "chart": drawn,
        "members": [
            {
                "record": record,
                "formula": formula(f"front{record.index}", record.criterion.text),
                "fall": fall,
                "trade_off": record is chosen,
                "perplexities": [_report_perplexity(record, task) for task in tasks],
            }
            for record, fall in zip(members, falls, strict=True)
        ],
    }


def falls_per_node(members: Sequence[Record]) -> list[float | None]:
    """Return each member's fall in fitness per node added since the previous member."""
    falls: list[float | None] = [None]
    for previous, record in pairwise(members):
        falls.append((previous.rank[0] - record.rank[0]) / (record.size - previous.size))
    return falls


def trade_off(members: Sequence[Record], scale: Scale | None) -> Record:
    """Return the member with the largest fall in fitness per node added.

    PySR (Cranmer, 2023, arXiv:2305.01582) chooses this way among accurate members; its measure is
    the logarithm of a loss, as the NLL is. Accurate here means a rise over dense of at most
    `BAD_TRADE` times the lowest; without a scale every member counts as accurate.
    """
    rises = [scale.relative(r.rank[0]) if scale else 1.0 for r in members]
    accurate = [rise <= BAD_TRADE * min(rises) or rise == min(rises) for rise in rises]
    scored = [
        (fall or 0.0, record)
        for record, fall, is_accurate in zip(
            members, falls_per_node(members), accurate, strict=True
        )
        if is_accurate
    ]
    return max(scored, key=lambda pair: pair[0])[1]


def _report_perplexity(record: Record, task: Mapping[str, Any]) -> float | None:
    """Return a record's perplexity on a task's report text, if it or an equal was measured."""
    measured = {member["index"]: member["perplexity"] for member in task.get("front", [])}
    if record.index in measured:
        return float(measured[record.index])
    grouped = task["pruning"]["pattern"] == "unstructured"
    by_criterion = {
        (known.criterion.text, known.criterion.group if grouped else ""): task["baselines"][name]
        for name, known in BASELINES.items()
        if name in task["baselines"]
    }
    best = task["best"]
    by_criterion[best["metric"], best["group"] if grouped else ""] = best["perplexity"]
    return by_criterion.get((record.criterion.text, record.criterion.group if grouped else ""))


def lineage(records: Sequence[Record], best: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best record's near and far ancestors, with their distance in generations.

    `roots` counts those without parents. None if the best record is not in the journal.
    """
    wanted = ("evaluated", best["metric"], best["group"])
    for record in records:
        if (record.outcome.kind, record.criterion.text, record.criterion.group) == wanted:
            entries = history.ancestry(records, record)
            return {
                "near": [entry for entry in entries if entry[0] <= NEAR],
                "far": [entry for entry in entries if entry[0] > NEAR],
                "count": len(entries) - 1,
                "generations": entries[-1][0],
                "roots": sum(not entry[1].candidate.parents for entry in entries),
            }
    return None


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
