"""The results of a run for people: the table on the report text, and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table

from pruning.baselines import BASELINES
from search.report.run import Run
from search.scale import unit_of
from search.verdict import verdict_of

SHOWN = (
    *("best", "dense", "baselines", "behind_best", "pruning", "perplexity_of"),
    *("candidates", "outcomes", "seconds", "selection"),
)
"""Keys that `summary.json` must have."""


FOUND = "best found"

RELATIVE_HEADINGS = ("task", "text", "dense", "best named", "", "best found", "relative rise")


def end_table(summary: dict[str, Any]) -> Table:
    """Return a summary's table of the dense model, baselines and best on the report text."""
    table = Table()
    for heading in ("", "metric", "group"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "perplexity", "behind best, nats/token"):
        table.add_column(heading, justify="right")
    for row in table_rows(summary):
        table.add_row(*row)
    return table


def title_of(summary: dict[str, Any]) -> str:
    """Return one line that says what the perplexities were measured on."""
    text, pruning = summary["perplexity_of"], summary["pruning"]
    rate = pruning["pattern"]
    if rate == "unstructured":
        rate = f"{pruning['sparsity']:.0%} unstructured"
    return (
        f"perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}"
    )


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Return the table's rows: dense, then the others by perplexity, the best first."""
    grouped = summary["pruning"]["pattern"] == "unstructured"
    dense = ("dense", "", "", "", f"{summary['dense']:.2f}", "")
    rows = []
    for name, value in summary["baselines"].items():
        baseline, gap = BASELINES.get(name), summary["behind_best"][name]
        criterion = baseline.criterion if baseline else None
        text, group, size = (
            (criterion.text, criterion.group, str(criterion.metric.size))
            if criterion
            else ("", "", "")
        )
        shown = (
            name,
            text,
            group if grouped else summary["pruning"]["pattern"],
            size,
            f"{value:.2f}",
            difference_text(gap["nats"], gap["standard_error"]),
        )
        rows.append((value, shown))
    best = summary["best"]
    group = best["group"] if grouped else summary["pruning"]["pattern"]
    shown = (FOUND, best["metric"], group, str(best["size"]), f"{best['perplexity']:.2f}", "")
    rows.append((best["perplexity"], shown))
    return [dense, *(row for _, row in sorted(rows, key=lambda pair: pair[0]))]


def relative_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the best found against the best named metric, by task and kind of text."""
    return [
        (
            task.get("name", ""),
            cell["text"],
            f"{cell['dense']:.2f}",
            f"{cell['named_perplexity']:.2f}",
            cell["named"],
            f"{cell['perplexity']:.2f}",
            f"{cell['relative_rise']:.3f}",
        )
        for task in tasks_of(summary)
        for cell in task.get("by_text", [])
    ]


def relative_table(rows: Sequence[tuple[str, ...]]) -> Table:
    """Return the table of `relative_rows`."""
    table = Table()
    for heading in RELATIVE_HEADINGS:
        justify: Literal["right", "left"] = "left" if heading in ("task", "text", "") else "right"
        table.add_column(heading, overflow="fold", justify=justify)
    for row in rows:
        table.add_row(*row)
    return table


def difference_text(nats: float, standard_error: float | None) -> str:
    """Return a paired difference with its standard error, if it has one."""
    return f"{nats:+.4f}" + (f" ± {standard_error:.4f}" if standard_error is not None else "")


def render(run: Run) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far."""
    # Imported here, so that a search does not load matplotlib when it starts.
    from search.report import layers, palette, sections

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    summary, records = dict(run.summary), run.records
    tasks = tasks_of(summary) if summary else []
    unit = summary.get("fitness_unit") or unit_of(len(run.scale.cells) if run.scale else 1)
    best = summary.get("best") or sections.best_so_far(records)
    references = sections.references(run.scale)
    return environment.get_template("report.html.j2").render(
        colours=Markup(palette.stylesheet()),
        title=sections.title(run.tasks or [{**task, **task["pruning"]} for task in tasks]),
        state=sections.state(run),
        verdict=verdict_of(summary) if summary else None,
        facts=sections.facts(run),
        config=run.config,
        apply=run.apply,
        summary=summary,
        best=best,
        winner=sections.winner(best["metric"]) if best else None,
        tasks=[
            {
                "name": task.get("name", ""),
                "model": task.get("model", ""),
                "title": title_of(task),
                "verdict": verdict_of({**task, "tasks": []}),
                "chart": sections.perplexities(f"report{number}", task),
                "rows": table_rows(task),
                "layers": layers.layers(f"task{number}", task),
            }
            for number, task in enumerate(tasks)
        ],
        unit=unit,
        objective=run.objective or summary.get("objective", "nll"),
        aggregate=sections.aggregate(run),
        relative=relative_rows(summary) if summary else [],
        relative_headings=RELATIVE_HEADINGS,
        progress=sections.progress(records, run.timings, unit, references),
        breeding=sections.breeding(records),
        front=sections.front(records, unit, references, run.scale, tasks),
        lineage=sections.lineage(records, best) if best else None,
        difference_text=difference_text,
    )


def tasks_of(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one summary per task; a run without a list of tasks is its own single task."""
    return [
        {
            **summary,
            **task,
            "pruning": {
                **summary["pruning"],
                **{key: task[key] for key in ("sparsity", "pattern") if key in task},
            },
            "best": {**summary["best"], **task["best"]},
        }
        for task in summary.get("tasks", [])
    ] or [summary]
