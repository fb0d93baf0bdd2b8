"""report.html: one file with charts, tables and formulas, without scripts or requests."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.leaves import LEAVES
from prunevolve.search.factors import shared_by_the_best
from prunevolve.search.population import Record, best_of_each_size, pareto_front
from prunevolve.search.report import tables
from prunevolve.search.scale import Scale, unit_of
from prunevolve.search.summary import Summary, verdict_of

BAD_TRADE = 1.5
"""Multiple of the lowest rise over dense beyond which no metric, however small, is a trade-off."""


@dataclass(frozen=True)
class Run:
    """What a report is made from: the contents of a run folder.

    Attributes:
        records: The journal; at least one candidate is evaluated.
        timings: The timing recorded for each candidate's evaluation, by index.
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


def render(run: Run) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far."""
    # Imported here, so that a search does not load matplotlib when it starts.
    from prunevolve.search.report import charts
    from prunevolve.search.report.formula import to_mathml

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    scale, summary = run.scale, run.summary
    names = ", ".join(task.name for task in run.config.all_tasks)
    evaluated = [record for record in run.records if record.fitness is not None]
    front = pareto_front(evaluated)
    chosen = trade_off(front, scale)
    winner = winner_of(evaluated, summary)
    sizes = best_of_each_size(evaluated)
    return environment.get_template("report.html.j2").render(
        run=run,
        summary=summary,
        title=f"Search for a pruning metric: {names}",
        state=state_of(run),
        verdict=verdict_of(summary.tasks, summary.best.metric) if summary else None,
        facts=facts_of(run),
        machine=machine_of(run),
        config=schema.to_yaml(run.config),
        winner=winner,
        unit=unit_of(len(scale.cells)),
        tasks=tasks_of(summary) if summary else [],
        fitness_chart=charts.fitness_chart("candidates", evaluated, scale),
        front=front_rows(front, chosen, scale, summary),
        front_chart=charts.front_chart("front", sizes, front, chosen, scale),
        ancestors=ancestry(run.records, winner),
        leaves={leaf: LEAVES[leaf].meaning for leaf in sorted(winner.criterion.metric.leaves)},
        shared=shared_by_the_best(run.records),
        tables=tables,
        to_mathml=to_mathml,
    )


def tasks_of(summary: Summary) -> list[dict[str, object]]:
    """Return what the page shows of each task."""
    from prunevolve.search.report.charts import perplexity_chart

    return [
        {
            "result": task,
            "verdict": verdict_of([task], summary.best.metric),
            "chart": perplexity_chart(f"report{number}", task),
            "rows": tables.perplexity_rows(task, summary.best),
        }
        for number, task in enumerate(summary.tasks)
    ]


def winner_of(evaluated: Sequence[Record], summary: Summary | None) -> Record:
    """Return the record chosen on the selection text; the fittest so far before the run ends."""
    if summary:
        chosen = (summary.best.metric, summary.best.group)
        return next(r for r in evaluated if (r.criterion.text, r.criterion.group) == chosen)
    return min(evaluated, key=lambda record: record.rank)


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
    """Return the facts about the run: candidates, seed, date, time."""
    kinds = Counter(record.outcome.kind for record in run.records)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    facts = {
        "Candidates": f"{len(run.records)}: {outcomes}",
        "Seed": str(run.config.search.seed),
        "Last candidate": run.ended.replace("T", " ").replace("+00:00", " UTC"),
    }
    if run.summary:
        facts["Time"] = f"{run.summary.seconds} s in the run's last process"
    return facts


def machine_of(run: Run) -> dict[str, str]:
    """Return the versions and the machine that the run began with."""
    machine = run.environment
    versions = {"Python": machine["python"], **machine["packages"]}
    devices = [f"{machine['cores']} cores", *(machine["cuda"] or []), machine["platform"]]
    return {
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": ", ".join(devices),
    }


def falls_per_node(front: Sequence[Record]) -> list[float | None]:
    """Return each member's fall in fitness per node added since the previous member."""
    falls: list[float | None] = [None]
    for previous, record in pairwise(front):
        falls.append((previous.rank[0] - record.rank[0]) / (record.size - previous.size))
    return falls


def accurate(front: Sequence[Record], scale: Scale) -> list[tuple[Record, float | None]]:
    """Return the members with a rise over dense of at most `BAD_TRADE` times the lowest.

    Each with its fall in fitness per node added.
    """
    rises = [scale.relative(record.rank[0]) for record in front]
    return [
        (record, fall)
        for record, fall, rise in zip(front, falls_per_node(front), rises, strict=True)
        if rise <= BAD_TRADE * min(rises) or rise == min(rises)
    ]


def trade_off(front: Sequence[Record], scale: Scale) -> Record:
    """Return the member with the largest fall in fitness per node added.

    PySR (Cranmer, 2023, arXiv:2305.01582) chooses this way among accurate members.
    """
    return max(accurate(front, scale), key=lambda pair: pair[1] or 0.0)[0]


def front_rows(
    front: Sequence[Record], chosen: Record, scale: Scale, summary: Summary | None
) -> list[tuple[str, ...]]:
    """Return the accurate members of the front, the best trade-off first, then by size."""
    members = sorted(accurate(front, scale), key=lambda pair: pair[0] is not chosen)
    tested: dict[int, list[str]] = {}
    for task in summary.tasks if summary else ():
        perplexities = {member.index: member.perplexity for member in task.front}
        for record, _ in members:
            known = perplexities.get(record.index)
            tested.setdefault(record.index, []).append("–" if known is None else f"{known:.2f}")
    return [
        (
            f"{record.size}, best trade-off" if record is chosen else str(record.size),
            f"{record.rank[0]:.4f}",
            "" if fall is None else f"{fall:.4f}",
            " / ".join(tested.get(record.index, [])),
            record.criterion.group,
            str(record.index),
            record.criterion.text,
        )
        for record, fall in members
    ]


def ancestry(records: Sequence[Record], start: Record) -> list[tuple[int, Record]]:
    """Return a record and all its ancestors with their distance, nearest first, each once."""
    ancestors, known, generation, distance = [(0, start)], {start.index}, [start], 0
    while generation:
        distance += 1
        parents = {parent for record in generation for parent in record.candidate.parents} - known
        known |= parents
        generation = [records[parent] for parent in sorted(parents)]
        ancestors += [(distance, record) for record in generation]
    return ancestors
