"""report.html: one white page with charts and tables, without scripts or requests."""

import io
import math
from base64 import b64encode
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import StrictUndefined, Template

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.progress import convergence
from prunevolve.search.records import Candidate, Outcome, Record

if TYPE_CHECKING:  # loaded only where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOUND = "best found"
FORMULA, LEFT_OUT = "formula", "left out"  # headings of columns of formulas

STANDING = ("candidate", "factors", "fitness", "selection", "vs best")  # of a finalist

_MOST_POINTS = 1000  # candidates that are drawn: each takes a hundred bytes
_OF_INTEREST = 3.0  # the highest fitness that the chart shows, if the best is not above it

NARROW, WIDE = 5.0, 9.6
"""Inches: of a chart for a phone, whose 10-point text is legible there, and for a screen."""

_STYLE: dict[str, object] = {
    "svg.hashsalt": "prunevolve",  # without it, the file differs each time
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Table:
    """A table; names come first, and formulas last, under one of their headings."""

    heading: str
    about: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def plain(self) -> int:
        """The number of columns without formulas."""
        return len(self.columns) - (self.columns[-1] in (FORMULA, LEFT_OUT))


def render(
    config: Config,
    records: Sequence[Record],  # at least one is evaluated
    summary: JsonObject | None,
    status: JsonObject,
    environment: JsonObject,
    commands: tuple[str, str],  # how to apply the best metric, and how to search on
    charts: tuple[str, str, str],  # SVG: the run, narrow and wide, and the winner's path, if any
) -> str:
    """Return `report.html`; for an unfinished run, with what its journal holds so far."""
    template = Template(
        (Path(__file__).parent / "report.html.j2").read_text("utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    evaluated = [record for record in records if record.fitness is not None]
    best = summary["best"] if summary else min(evaluated, key=lambda record: record.rank).described
    metric = Metric.parse(str(best["metric"]))
    measured = measured_tables(summary) if summary else []
    learned = _learned(evaluated, summary, status.get("baselines", {}))
    tables = _each_formula_once([*measured, *learned], metric.infix)
    page: str = template.render(
        config=config,
        yaml=schema.to_yaml(config),
        records=records,
        outcomes=Counter(record.outcome.kind for record in records).most_common(),
        summary=summary,
        convergence=convergence([record.fitness for record in records]),
        measured=tables[: len(measured)],
        learned=tables[len(measured) :],
        environment=environment,
        written=str(status["written"]).replace("T", " ").replace("+00:00", " UTC"),
        commands=commands,
        charts=[b64encode(chart.encode()).decode() for chart in charts],
        about_winner=about_winner(best, evaluated),
        best=best,
        metric=metric,
        statistics={name: TERMINALS[name].meaning for name in sorted(metric.terminals)},
    )
    return page


def _learned(
    evaluated: Sequence[Record], summary: JsonObject | None, baselines: Mapping[str, float]
) -> list[Table]:
    """Return what was learned on the fitness and the selection text."""
    candidates = [{"name": str(r.index), **r.described} for r in evaluated]
    if not summary:
        return [front_table(candidates, baselines, "")]
    finalists = summary["selection"]
    rows = {row["name"]: row for row in [*candidates, *finalists]}
    front = front_table([*rows.values()], baselines, str(summary["best"]["name"]))
    return [path_table(summary["path"]), finalist_table(finalists), front]


def _each_formula_once(tables: Sequence[Table], best: str) -> list[Table]:
    """Return tables in which a formula that stands further up, as the best one does, is the name
    of its row there, or nothing if that is the name of this row, too.
    """
    names = {best: FOUND}

    def cell(name: str, formula: str) -> str:
        if formula not in names:
            names[formula] = name
            return formula
        return "" if names[formula] == name else f"as {names[formula]}"

    return [
        replace(table, rows=[(*row[:-1], cell(row[0], row[-1])) for row in table.rows])
        if table.columns[-1] == FORMULA
        else table
        for table in tables
    ]


def _joined(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return one row for each group and formula, the last two of a row, with all names."""
    joined: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, *values in rows:
        equal = joined.get(tuple(values[-2:]))
        joined[tuple(values[-2:])] = (f"{equal[0]}, {name}" if equal else name, *values)
    return list(joined.values())


def measured_tables(summary: JsonObject) -> list[Table]:
    """Return what was measured on the report text: a table a task, and one over tasks and texts."""
    tasks = summary["tasks"]
    tables = [_task_table(task, summary["best"], len(tasks) > 1) for task in tasks]
    rows = [
        (
            *(task["name"], cell["text"], f"{cell['dense']:.2f}", cell["named"]),
            *(f"{cell['named_perplexity']:.2f}", shown(cell["perplexity"])),
            shown(cell["relative_rise"], 3),
        )
        for task in tasks
        for cell in task["by_text"]
    ]
    if len(rows) > 1:
        about = f"Perplexities; fitness is relative to {best_of_the_baselines(tasks)}."
        columns = ("task", "text", "dense", "best baseline", "its perplexity", FOUND, "fitness")
        tables.append(Table("By task and kind of text", about, columns, rows))
    return tables


def _task_table(task: JsonObject, best: JsonObject, is_one_of_several: bool) -> Table:
    """Return a task's perplexities: dense, then the others, the best first."""
    text = task["perplexity_of"]
    is_unstructured = task["pattern"] == "unstructured"
    rate = f"{task['sparsity']:.0%} unstructured" if is_unstructured else task["pattern"]
    about = (
        f"Perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}, model "
        f"{task['model']}; ± is a standard error, window by window."
    )
    if is_one_of_several:
        about = f"{task['verdict']} {about}"
    rows = [("dense", f"{task['dense']:.2f}", "", "", "")]
    perplexities = {FOUND: task["best"]["perplexity"], **task["baselines"]}
    # What cannot prune the model has none, and comes last.
    for name, perplexity in sorted(perplexities.items(), key=lambda x: (x[1] is None, x[1])):
        criterion, behind = Criterion.parse(best["metric"], best["group"]), ""
        if name != FOUND:
            criterion = named_metric(name)
            gap = task["behind_best"][name]
            behind = "" if gap["nats"] is None else _gap(gap, "nats")
        group = criterion.group if is_unstructured else task["pattern"]
        rows.append((name, shown(perplexity), behind, group, criterion.metric.infix))
    columns = ("metric", "perplexity", "vs best found, nats/token", "group", FORMULA)
    return Table(f"Result on the report text: {task['name']}", about, columns, _joined(rows))


def shown(value: float | None, digits: int = 2) -> str:
    """Return a figure of a metric; null is that of one that cannot prune the model."""
    return "none" if value is None else f"{value:.{digits}f}"


def best_of_the_baselines(tasks: Sequence[JsonObject]) -> str:
    """Return what a metric is compared with."""
    return f"the best of the {max(len(task['baselines']) for task in tasks)} baselines"


def about_winner(best: JsonObject, evaluated: Sequence[Record]) -> str:
    """Say how good the best metric is, and how good the fittest candidate, which may be another."""
    fittest = min(evaluated, key=lambda record: record.rank)
    line = f"Fitness {best['fitness']:.4f}, {best['size']} nodes, comparison group {best['group']}."
    if best.get("selection") is None:
        return line
    return (
        f"Candidate {best['name']}: {best['factors']} factors, fitness {best['fitness']:.4f}, on "
        f"the selection text {best['selection']:.4f}; comparison group {best['group']}. The "
        f"fittest candidate is {fittest.index}, with {fittest.rank[0]:.4f}."
    )


def _standing(row: JsonObject, *more: str) -> tuple[str, ...]:
    """Return a finalist's row of a table, with more cells at the end."""
    name = row["name"] + (", chosen" if row["chosen"] else "")
    fitness, selection = f"{row['fitness']:.4f}", f"{row['selection']:.4f}"
    return (name, str(row["factors"]), fitness, selection, _gap(row, "difference"), *more)


def path_table(path: Sequence[JsonObject]) -> Table:
    """Return the winner's candidate with ever fewer factors."""
    rows = [
        _standing(step, Metric.parse(step["left_out"]).infix if step["left_out"] else "")
        for step in sorted(path, key=lambda step: -step["factors"])
    ]
    about = (
        "Each row drops the factor whose absence costs least. Formulas with more factors than a "
        "winner may have are measured in the first row alone, and what is more than 10% worse than "
        "the best on the fitness texts has no row. The shortest finalist wins that is at most 2% "
        "worse than the best one, and within the standard error, between windows and models."
    )
    return Table("Fewer factors", about, (*STANDING, LEFT_OUT), rows)


def finalist_table(finalists: Sequence[JsonObject]) -> Table:
    """Return all finalists, the best first."""
    rows = [_standing(row, row["group"], Metric.parse(row["metric"]).infix) for row in finalists]
    about = (
        "By the mean of the fitness on both texts, which is compared with the best of those with "
        "few factors; behind a dash: how many were left out. run_prune.py --metric RUN:NAME prunes "
        "by any of them."
    )
    return Table("Finalists", about, (*STANDING, "group", FORMULA), _joined(rows))


def front_table(bred: Sequence[JsonObject], baselines: Mapping[str, float], chosen: str) -> Table:
    """Return the bred metrics and the baselines that no smaller one equals or beats, by size."""
    named: list[JsonObject] = []
    for name, fitness in baselines.items():
        record = Record(Candidate(-1, named_metric(name)), Outcome("evaluated", fitness))
        named.append({"name": name, **record.described})
    rows, best = list[tuple[str, ...]](), math.inf
    for row in sorted([*named, *bred], key=lambda row: (row["size"], row["fitness"])):
        is_chosen = row["name"] == chosen
        if row["fitness"] < best or is_chosen:
            best = min(best, row["fitness"])
            name = row["name"] + (", chosen" if is_chosen else "")
            formula = (row["group"], Metric.parse(row["metric"]).infix)
            rows.append((name, str(row["size"]), f"{row['fitness']:.4f}", *formula))
    about = (
        "Of each size the fittest, if no smaller one is as fit, and the chosen one. "
        "hall_of_fame.csv has their texts."
    )
    columns = ("candidate or baseline", "size", "fitness", "group", FORMULA)
    return Table("Pareto front of the found and the baselines", about, columns, _joined(rows))


def _gap(gap: JsonObject, name: str) -> str:
    """Return a paired difference with its standard error, if it has one."""
    if gap[name] is None:
        return "cannot prune"
    error = gap["standard_error"]
    return f"{gap[name]:+.4f}" + ("" if error is None else f" ±\N{NO-BREAK SPACE}{error:.4f}")


def fitness_chart(records: Sequence[Record], population: int, width: float = NARROW) -> str:
    """Draw the fitness of evaluated candidates in the order of breeding, the best so far, and the
    median of the best ones so far, as many as the population has.

    Horizontal lines are the dense model, at 0, and the best baseline, at 1. The chart leaves out
    what is far above, or the line of the best would look flat; its axis says how many. At least one
    candidate of the journal is evaluated; the width is in inches.
    """
    evaluated = [record for record in records if record.fitness is not None]
    fitness = [record.rank[0] for record in evaluated]
    best = list(accumulate(fitness, min))
    low, top = min(0.0, best[-1]), max(_OF_INTEREST, 1.3 * best[-1])
    above = sum(value > top for value in fitness)
    dots = evaluated[:: math.ceil(len(evaluated) / _MOST_POINTS)]
    ranked: list[float] = []
    median = []
    for value in fitness:
        insort(ranked, value)
        del ranked[population:]
        median.append(ranked[len(ranked) // 2])
    lines = {"best so far": (best, 1.0), f"median of the best {population}": (median, 0.4)}
    # The last values hold up to the last candidate, whatever became of that.
    indices = [*(record.index for record in evaluated), records[-1].index]
    with _drawn(width, 3.6) as (figure, axes, chart):
        axes.set_ylim(low - 0.15, top)
        axes.plot([r.index for r in dots], [r.rank[0] for r in dots], ".", color="#8db3d9")
        for name, (values, alpha) in lines.items():
            steps = [*values, values[-1]]
            axes.step(indices, steps, where="post", color="#c0392b", alpha=alpha, label=name)
        for level, name in enumerate(("dense", "best baseline")):
            axes.axhline(level, color="#555555", linewidth=0.7, zorder=1)
            axes.annotate(name, (1.02, level), xycoords=("axes fraction", "data"), va="center")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        name = "fitness" + (f"; {above} candidates lie above" if above else "")
        axes.set(xlabel="candidates", ylabel=name)
    return chart.getvalue()


def path_chart(path: Sequence[JsonObject]) -> str:
    """Draw the fitness on both texts along the path of `summary.json`, by the number of factors."""
    steps = sorted(path, key=lambda step: step["factors"])
    factors = [step["factors"] for step in steps]
    with _drawn(NARROW, 3.0) as (_, axes, chart):
        for name, color in (("fitness", "#8db3d9"), ("selection", "#c0392b")):
            values = [step[name] for step in steps]
            axes.plot(factors, values, ".-", color=color, label=f"{name} text")
        for step in steps:
            if step["chosen"]:
                axes.axvline(step["factors"], color="#555555", linewidth=0.7, zorder=1)
                axes.annotate("chosen", (step["factors"], 1.01), xycoords=("data", "axes fraction"))
        lowest = min(step["fitness"] + step["selection"] for step in steps) / 2
        axes.set_ylim(top=min(axes.get_ylim()[1], lowest + 1))
        axes.set(xticks=factors, xlabel="factors", ylabel="fitness")
        axes.legend(frameon=False)
    return chart.getvalue()


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple["Figure", "Axes", io.StringIO]]:
    """Yield a figure of so many inches, its axes, and what is its SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    chart = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(), chart
        figure.savefig(chart, format="svg", metadata={"Creator": None, "Date": None})
