"""What report.html shows, section by section: the charts and tables made of a run's files."""

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
"""Times the least rise over dense from which on a metric is no trade-off, however small it is."""

NEAR = 2
"""Generations of ancestors that are shown unfolded."""


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


def title(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return what was searched on what: of each task `model`, `sparsity` and `pattern`."""
    models = dict.fromkeys(task["model"] for task in tasks if task.get("model"))
    rates = dict.fromkeys(
        f"{task['sparsity']:.0%}" if task["pattern"] == "unstructured" else task["pattern"]
        for task in tasks
    )
    where = f" for {_and(list(models))}" if models else ""
    return f"Search for a pruning metric{where}" + (f" at {_and(list(rates))}" if rates else "")


def state(run: Run) -> str:
    """Return in a sentence that the report is not the whole run's; empty if it is."""
    done = len(run.records)
    if not run.summary:
        return (
            f"This run has not ended: the report shows its first {done} candidates. Nothing was "
            "measured on the report text yet, so there is no verdict."
        )
    if run.summary["candidates"] < done:
        return (
            f"This run went on after its end: results on the selection and report texts are of "
            f"the first {run.summary['candidates']} candidates, everything else of {done}."
        )
    return ""


def facts(run: Run) -> dict[str, str]:
    """Return what makes the run: candidates, seed, date, versions."""
    kinds = Counter(record.outcome.kind for record in run.records)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    found = {"Candidates": f"{len(run.records)}: {outcomes}" if outcomes else "none"}
    if run.seed is not None:
        found["Seed"] = str(run.seed)
    if run.ended:
        found["Last candidate"] = run.ended.replace("T", " ").replace("+00:00", " UTC")
    if run.summary:
        found["Time"] = f"{run.summary['seconds']} s in the run's last process"
    if packages := run.environment.get("packages"):
        versions = {"Python": run.environment.get("python", ""), **packages}
        found["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        devices = run.environment.get("cuda") or []
        machine = [f"{run.environment.get('cores')} cores", *devices]
        found["Machine"] = ", ".join([*machine, run.environment.get("platform", "")])
    return found


def aggregate(run: Run) -> str:
    """Return how the rises of several cells become a fitness; empty if there is a single one."""
    if run.scale:
        return run.scale.aggregate if len(run.scale.cells) > 1 else ""
    cells = sum(len(task.get("by_text", ())) for task in run.summary.get("tasks", ()))
    return str(run.summary.get("aggregate", "mean")) if cells > 1 else ""


def references(scale: Scale | None) -> References:
    """Return the fitness of the dense model and the named metrics, as far as it was kept."""
    if scale is None:
        return References()
    sizes = {name: known.criterion.metric.size for name, known in BASELINES.items()}
    return References(scale.dense_fitness, scale.named_fitness, sizes)


def perplexities(name: str, task: Mapping[str, Any]) -> Chart:
    """Return the chart of one task's perplexities on its report text."""
    return perplexity_chart(name, "Perplexity on the report text", task)


def best_so_far(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the fittest record as `summary.json` has the winner; None if none was evaluated."""
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
    """Return the charts of fitness against candidates and, if it was noted, against time."""
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
        axis = f"{unit}, estimated: busy time of the workers / their number"
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

    Each member has its record, its formula, its fall of fitness for each node more than the member
    before it, whether it is the best trade-off, and its perplexity on each task's report text; None
    where it was not measured. None if nothing was evaluated.
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
    """Return each member's fall of fitness for each node that it has more than the one before."""
    falls: list[float | None] = [None]
    for before, record in pairwise(members):
        falls.append((before.rank[0] - record.rank[0]) / (record.size - before.size))
    return falls


def trade_off(members: Sequence[Record], scale: Scale | None) -> Record:
    """Return the member with the largest fall of fitness for each node added.

    PySR (Cranmer, 2023, arXiv:2305.01582) chooses so among the accurate ones; its measure is the
    logarithm of a loss, as the NLL is. Accurate is here a rise over dense of at most `BAD_TRADE`
    times the least one; without a scale every member is.
    """
    rises = [scale.relative(r.rank[0]) if scale else 1.0 for r in members]
    accurate = [rise <= BAD_TRADE * min(rises) or rise == min(rises) for rise in rises]
    scored = [
        (fall or 0.0, record)
        for record, fall, fits in zip(members, falls_per_node(members), accurate, strict=True)
        if fits
    ]
    return max(scored, key=lambda pair: pair[0])[1]


def _report_perplexity(record: Record, task: Mapping[str, Any]) -> float | None:
    """Return a record's perplexity on a task's report text, if it or its double was measured."""
    measured = {one["index"]: one["perplexity"] for one in task.get("front", [])}
    if record.index in measured:
        return float(measured[record.index])
    grouped = task["pruning"]["pattern"] == "unstructured"
    same = {
        (known.criterion.text, known.criterion.group if grouped else ""): task["baselines"][name]
        for name, known in BASELINES.items()
        if name in task["baselines"]
    }
    best = task["best"]
    same[best["metric"], best["group"] if grouped else ""] = best["perplexity"]
    return same.get((record.criterion.text, record.criterion.group if grouped else ""))


def lineage(records: Sequence[Record], best: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best one's ancestors, the near and the far, with their distance in generations.

    `roots` are those that were bred from none. None if it is not in the journal.
    """
    wanted = ("evaluated", best["metric"], best["group"])
    for record in records:
        if (record.outcome.kind, record.criterion.text, record.criterion.group) == wanted:
            found = history.ancestry(records, record)
            return {
                "near": [entry for entry in found if entry[0] <= NEAR],
                "far": [entry for entry in found if entry[0] > NEAR],
                "count": len(found) - 1,
                "generations": found[-1][0],
                "roots": sum(not entry[1].candidate.parents for entry in found),
            }
    return None


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
