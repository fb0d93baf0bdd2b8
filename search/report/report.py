"""report.html: one white page with a chart and tables, without scripts or requests."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.statistics import LEAVES
from prunevolve.search.factors import shared_by_the_best
from prunevolve.search.population import Record, pareto_front
from prunevolve.search.scale import Scale
from prunevolve.search.summary import (
    FactorWorth,
    Summary,
    TaskResult,
    Winner,
    best_of_the_baselines,
    verdict_of,
)

FOUND = "best found"


@dataclass(frozen=True)
class Table:
    """A table with its headings; numbers come before formulas, which are last, under `metric`."""

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Run:
    """What a report is made from: the contents of a run folder.

    Attributes:
        records: The journal; at least one candidate is evaluated.
        ended: When the last candidate's outcome was written, ISO 8601.
        summary: None before the run ends.
        apply, search_on: The commands that apply the best metric, and that breed more candidates.
    """

    config: Config
    records: Sequence[Record]
    scale: Scale
    environment: Mapping[str, Any]
    ended: str
    summary: Summary | None
    apply: str
    search_on: str

    @property
    def evaluated(self) -> list[Record]:
        """The records that have a fitness."""
        return [record for record in self.records if record.fitness is not None]


def render(run: Run, chart: str) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far.

    Args:
        chart: The chart of the run, an SVG document.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    summary, winner = run.summary, winner_of(run)
    names = ", ".join(task.name for task in run.config.tasks)
    return environment.get_template("report.html.j2").render(
        run=run,
        title=f"Search for a pruning metric: {names}",
        state=state_of(run),
        result=result_of(summary) if summary else None,
        chart=Markup(chart[chart.index("<svg") :]),
        unit="x best named",
        winner=winner,
        leaves={leaf: LEAVES[leaf].meaning for leaf in sorted(winner.criterion.metric.leaves)},
        front=front_table(run.evaluated),
        shared=shared_table(run.records),
        facts=facts_of(run),
        config=schema.to_yaml(run.config),
    )


def result_of(summary: Summary) -> dict[str, object]:
    """Return what the page shows of what was measured at a run's end."""
    return {
        "verdict": verdict_of(summary.tasks),
        "against": best_of_the_baselines(summary.tasks),
        "tasks": [
            {
                "name": task.name,
                "measured_on": f"{title_of(task)}, model {task.model}",
                "sentence": verdict_of([task]).sentence,
                "table": perplexity_table(task, summary.best),
            }
            for task in summary.tasks
        ],
        "relative": relative_table(summary),
        "finalists": finalist_table(summary),
        "factors": factor_table(summary),
    }


def winner_of(run: Run) -> Record:
    """Return the record chosen on the selection text; the fittest so far before the run ends."""
    if run.summary:
        chosen = (run.summary.best.metric, run.summary.best.group)
        return next(r for r in run.evaluated if (r.criterion.text, r.criterion.group) == chosen)
    return min(run.evaluated, key=lambda record: record.rank)


def state_of(run: Run) -> str:
    """Return a sentence on what the report does not cover; empty if it covers the whole run."""
    done = len(run.records)
    if not run.summary:
        return (
            f"This run has not ended: the report shows its first {done} candidates. Nothing has "
            "been measured on the report text yet, so there is no verdict."
        )
    if run.summary.candidates < done:
        return (
            "This run was extended after it ended: results on the selection and report texts cover "
            f"the first {run.summary.candidates} candidates, everything else covers {done}."
        )
    return ""


def facts_of(run: Run) -> dict[str, str]:
    """Return the facts about the run: candidates, seed, time, versions and machine."""
    kinds = Counter(record.outcome.kind for record in run.records)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    machine = run.environment
    versions = {"Python": machine["python"], **machine["packages"]}
    devices = [f"{machine['cores']} cores", *(machine["cuda"] or []), machine["platform"]]
    facts = {
        "Candidates": f"{len(run.records)}: {outcomes}",
        "Seed": str(run.config.search.seed),
        "Last candidate": run.ended.replace("T", " ").replace("+00:00", " UTC"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": ", ".join(devices),
    }
    if run.summary:
        diversity = run.summary.diversity
        facts["Time"] = f"{run.summary.seconds} s in the run's last process"
        facts["Population"] = (
            f"{diversity.members} members with {diversity.masks} different masks, at a mean "
            f"distance of {diversity.mean_distance:.3f}"
        )
    return facts


# The tables


def title_of(task: TaskResult) -> str:
    """Return one line that says what the perplexities were measured on."""
    text = task.perplexity_of
    rate = f"{task.sparsity:.0%} unstructured" if task.has_groups else task.pattern
    return (
        f"perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}"
    )


def perplexity_table(task: TaskResult, best: Winner) -> Table:
    """Return a task's perplexities: dense, then the others, the best first."""
    rows = [("dense", f"{task.dense:.2f}", "", "", "")]
    perplexities = {FOUND: task.best.perplexity, **task.baselines}
    for name, perplexity in sorted(perplexities.items(), key=lambda item: item[1]):
        if name == FOUND:
            criterion, behind = Criterion.parse(best.metric, best.group), ""
        else:
            criterion, gap = BASELINES[name].criterion, task.behind_best[name]
            behind = _difference(gap.nats, gap.standard_error)
        group = criterion.group if task.has_groups else task.pattern
        rows.append((name, f"{perplexity:.2f}", behind, group, criterion.metric.infix))
    return Table(("", "perplexity", "vs best found, nats/token", "group", "metric"), rows)


def relative_table(summary: Summary) -> Table:
    """Return the best found against the best baseline, by task and kind of text."""
    rows = [
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
    return Table(("task", "text", "dense", "best baseline", "", FOUND, "relative rise"), rows)


def finalist_table(summary: Summary) -> Table:
    """Return the finalists on the selection text, best first."""
    rows = [
        (
            str(finalist.index),
            f"{finalist.selection_loss:.4f}",
            _difference(finalist.difference, finalist.standard_error) if place else "–",
            f"{finalist.fitness:.4f}",
            finalist.group,
            Metric.parse(finalist.metric).infix,
        )
        for place, finalist in enumerate(summary.selection)
    ]
    return Table(("candidate", "loss", "vs best", "fitness", "group", "metric"), rows)


def factor_table(summary: Summary) -> Table:
    """Return what the winner loses without each of its factors, the most first."""

    def lost(worth: FactorWorth) -> float:
        return math.inf if worth.difference is None else worth.difference

    rows = [
        (
            "cannot prune"
            if worth.difference is None
            else _difference(worth.difference, worth.standard_error),
            Metric.parse(worth.factor).infix,
        )
        for worth in sorted(summary.factors, key=lost, reverse=True)
    ]
    return Table(("loss without it", "metric"), rows)


def front_table(evaluated: Sequence[Record]) -> Table:
    """Return the candidates that no smaller one equals or beats, by size."""
    rows = [
        (str(r.size), f"{r.rank[0]:.4f}", str(r.index), r.criterion.metric.infix)
        for r in pareto_front(evaluated)
    ]
    return Table(("size", "fitness", "candidate", "metric"), rows)


def shared_table(records: Sequence[Record]) -> Table:
    """Return the parts that the best candidates have more often than the rest."""
    rows = [(kind, best, rest, part) for kind, part, best, rest in shared_by_the_best(records)]
    return Table(("", "the best tenth", "the rest", "part"), rows)


def _difference(difference: float, standard_error: float | None) -> str:
    """Return a paired difference with its standard error, if it has one."""
    error = "" if standard_error is None else f" ± {standard_error:.4f}"
    return f"{difference:+.4f}{error}"
