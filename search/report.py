"""What a person looks at when a run has ended: the table on the report text, and report.html."""

import io
from itertools import accumulate
from typing import Any

from jinja2 import Environment
from rich.table import Table

from pruning.baselines import BASELINES
from pruning.metric import Metric
from search.journal import RunFolder
from search.population import Record


def end_table(summary: dict[str, Any]) -> Table:
    """Return the table of dense, baselines and best on the report text, from a summary."""
    table = Table()
    for heading in ("", "metric", "group"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "perplexity", "behind best, nats/token"):
        table.add_column(heading, justify="right")
    for row in table_rows(summary):
        table.add_row(*row)
    return table


def title_of(summary: dict[str, Any]) -> str:
    """Return one line that says what the perplexities are of."""
    text, pruning = summary["perplexity_of"], summary["pruning"]
    rate = pruning["pattern"]
    if rate == "unstructured":
        rate = f"{pruning['sparsity']:.0%} unstructured"
    return (
        f"perplexity at {rate} on {text['corpus']} {text['split']}: {text['windows']} windows of "
        f"{text['length']} tokens ({text['tokens']} in all), {text['dtype']}"
    )


def table_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Return the table's rows, worst first, the best found last."""
    grouped = summary["pruning"]["pattern"] == "unstructured"
    rows = [("dense", "", "", "", f"{summary['dense']:.2f}", "")]
    for name, value in sorted(summary["baselines"].items(), key=lambda item: -item[1]):
        baseline, gap = BASELINES[name], summary["behind_best"][name]
        rows.append(
            (
                name,
                baseline.text,
                baseline.group if grouped else summary["pruning"]["pattern"],
                str(baseline.metric.size),
                f"{value:.2f}",
                difference_text(gap["nats"], gap["standard_error"]),
            )
        )
    best = summary["best"]
    group = best["group"] if grouped else summary["pruning"]["pattern"]
    rows.append(
        ("best found", best["metric"], group, str(best["size"]), f"{best['perplexity']:.2f}", "")
    )
    return rows


def difference_text(nats: float, standard_error: float | None) -> str:
    """Return a paired difference with its standard error, if it has one."""
    return f"{nats:+.4f}" + (f" ± {standard_error:.4f}" if standard_error is not None else "")


def write_report(folder: RunFolder) -> None:
    """Rebuild `report.html` from the run folder's other files.

    Raises:
        FolderError: If the run has not ended or a file is damaged.
    """
    summary = folder.read_json("summary.json")
    page = Environment(autoescape=True).from_string(_PAGE)
    records = folder.read_records()
    html = page.render(
        title=title_of(summary),
        rows=table_rows(summary),
        summary=summary,
        difference_text=difference_text,
        chart=_fitness_chart(records),
        tree=Metric.parse(summary["best"]["metric"]).text,
    )
    folder.write_text("report.html", html)


def _fitness_chart(records: list[Record]) -> str:
    """Return fitness against candidates as SVG text: each evaluated one, and the best so far."""
    # The figure class, not pyplot: no window, no global state.
    from matplotlib.figure import Figure

    evaluated = [(r.index, r.fitness) for r in records if r.fitness is not None]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    indices = [index for index, _ in evaluated]
    fitness = [value for _, value in evaluated]
    axes.scatter(indices, fitness, s=8, label="evaluated")
    best = list(accumulate(fitness, min))
    axes.plot(indices, best, drawstyle="steps-post", color="C1", label="best so far")
    axes.set(xlabel="candidate", ylabel="fitness: mean NLL, nats per token")
    axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue().partition("<svg")[2].join(["<svg", ""])


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>prunevolve run</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left; }
tr:last-child td { font-weight: bold; }
code { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
</style>
</head>
<body>
<h1>prunevolve run</h1>
<p>Best metric: <code>{{ tree }}</code>, group {{ summary.best.group }}.</p>
<h2>Report text</h2>
<p>{{ title }}</p>
<table>
<tr><th></th><th>metric</th><th>group</th><th>size</th><th>perplexity</th>
<th>behind best, nats/token</th></tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Finalists on the selection text</h2>
<table>
<tr><th>candidate</th><th>metric</th><th>size</th><th>fitness</th><th>selection loss</th>
<th>behind best</th></tr>
{% for one in summary.selection %}<tr><td>{{ one.index }}</td><td><code>{{ one.metric }}</code></td>
<td>{{ one.size }}</td><td>{{ "%.4f"|format(one.fitness) }}</td>
<td>{{ "%.4f"|format(one.selection_loss) }}</td>
<td>{{ difference_text(one.difference, one.standard_error) }}</td></tr>
{% endfor %}</table>
<h2>Search</h2>
<p>{{ summary.candidates }} candidates in {{ summary.seconds }} seconds:
{% for kind, count in summary.outcomes.items() %}{{ count }} {{ kind }}
{%- if not loop.last %}, {% endif %}{% endfor %}.</p>
{{ chart|safe }}
</body>
</html>
"""
