"""report.html: one file with charts, tables and formulas, without scripts or requests."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs import schema
from configs.schema import Config
from pruning.leaves import LEAVES
from search.population import Record, best_of_each_size, pareto_front
from search.report import tables
from search.scale import Scale, unit_of
from search.summary import Summary, verdict_of

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
    timings: Mapping[int, Mapping[str, float]]
    environment: Mapping[str, Any]
    ended: str
    summary: Summary | None
    apply: str
    search_on: str


def render(run: Run) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far."""
    # Imported here, so that a search does not load matplotlib when it starts.
    from search.report import charts
    from search.report.formula import to_mathml

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
    indices = [float(record.index) for record in evaluated]
    time_axis, times = elapsed(evaluated, run.timings)
    sizes = best_of_each_size(evaluated)
    return environment.get_template("report.html.j2").render(
        run=run,
        summary=summary,
        title=f"Search for a pruning metric: {names}",
        state=state_of(run),
        verdict=verdict_of(summary.tasks, summary.best.metric) if summary else None,
        facts=facts_of(run),
        config=schema.to_yaml(run.config),
        winner=winner,
        unit=unit_of(len(scale.cells)),
        tasks=tasks_of(summary) if summary else [],
        progress=[
            charts.fitness_chart("candidates", evaluated, indices, "candidates bred", scale),
            charts.fitness_chart("time", evaluated, times, time_axis, scale),
        ],
        front=list(zip(front, falls_per_node(front), strict=True)),
        front_chart=charts.front_chart("front", sizes, front, chosen, scale),
        trade_off=chosen,
        ancestors=ancestry(run.records, winner),
        leaves=LEAVES,
        tables=tables,
        to_mathml=to_mathml,
    )


def tasks_of(summary: Summary) -> list[dict[str, object]]:
    """Return what the page shows of each task."""
    from search.report.charts import perplexity_chart

    return [
        {
            "result": task,
            "verdict": verdict_of([task], summary.best.metric),
            "chart": perplexity_chart(f"report{number}", task),
            "rows": tables.perplexity_rows(task, summary.best),
            "front": {member.index: member.perplexity for member in task.front},
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
    """Return the facts about the run: candidates, seed, date, time, versions, machine."""
    kinds = Counter(record.outcome.kind for record in run.records)
    outcomes = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    machine = run.environment
    versions = {"Python": machine["python"], **machine["packages"]}
    facts = {
        "Candidates": f"{len(run.records)}: {outcomes}",
        "Seed": str(run.config.search.seed),
        "Last candidate": run.ended.replace("T", " ").replace("+00:00", " UTC"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Machine": ", ".join(
            [f"{machine['cores']} cores", *(machine["cuda"] or []), machine["platform"]]
        ),
    }
    if run.summary:
        facts["Time"] = f"{run.summary.seconds} s in the run's last process"
    return facts


def elapsed(
    evaluated: Sequence[Record], timings: Mapping[int, Mapping[str, float]]
) -> tuple[str, list[float]]:
    """Return a unit of time, and when each candidate's outcome arrived in a search without pauses.

    This is the time that the workers spent on this and all earlier candidates, divided by the
    number of workers: it ignores idle time, stops and resumes.
    """
    workers = {timing["worker"] for timing in timings.values() if "worker" in timing}
    indices = range(evaluated[-1].index + 1)
    busy = (timings.get(index, {}).get("seconds", 0.0) for index in indices)
    seconds = [total / max(1, len(workers)) for total in accumulate(busy)]
    units = {"hours": 3600, "minutes": 60}
    unit = next((unit for unit, length in units.items() if seconds[-1] >= 2 * length), "seconds")
    times = [seconds[record.index] / units.get(unit, 1) for record in evaluated]
    return f"{unit} (busy time / workers)", times


def falls_per_node(front: Sequence[Record]) -> list[float | None]:
    """Return each member's fall in fitness per node added since the previous member."""
    falls: list[float | None] = [None]
    for previous, record in pairwise(front):
        falls.append((previous.rank[0] - record.rank[0]) / (record.size - previous.size))
    return falls


def trade_off(front: Sequence[Record], scale: Scale) -> Record:
    """Return the member with the largest fall in fitness per node added.

    PySR (Cranmer, 2023, arXiv:2305.01582) chooses this way among accurate members. Accurate means
    here a rise over dense of at most `BAD_TRADE` times the lowest.
    """
    rises = [scale.relative(record.rank[0]) for record in front]
    scored = [
        (fall or 0.0, record)
        for record, fall, rise in zip(front, falls_per_node(front), rises, strict=True)
        if rise <= BAD_TRADE * min(rises) or rise == min(rises)
    ]
    return max(scored, key=lambda pair: pair[0])[1]


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
