"""A run's results for people: report.html, the tables at the end, and how to apply the metric."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from configs import schema
from configs.schema import Config
from search.journal import FolderError, RunFolder
from search.prepare import read_scale
from search.report import tables
from search.report.page import Run, render
from search.summary import Summary


def say_results(summary: Summary, console: Console) -> None:
    """Print the tables of perplexities and the verdict."""
    for task in summary.tasks:
        console.print(tables.title_of(task), soft_wrap=True)
        rows = tables.perplexity_rows(task, summary.best)
        console.print(tables.screen_table(tables.PERPLEXITY_HEADINGS, rows))
    rows = tables.relative_rows(summary)
    if len(rows) > 1:
        console.print(tables.screen_table(tables.RELATIVE_HEADINGS, rows))
    console.print(f"verdict: {summary.verdict}", soft_wrap=True)


def say_files(folder: RunFolder, config: Config, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply the metric."""
    for name, file in {"report": "report.html", "metric": "best_metric.json"}.items():
        console.print(f"{name}: {folder.path / file}", soft_wrap=True)
    console.print(f"apply it: {apply_command(folder.path, config)}", soft_wrap=True)


def write_report(folder: RunFolder) -> bool:
    """Write `report.html` from the run folder's other files; return whether the run is finished.

    Another process may go on working there: only whole lines of its journal are read.

    Raises:
        FolderError: If nothing is evaluated yet, or a file is damaged.
    """
    records, scale = folder.records_so_far(), read_scale(folder)
    if not scale or not any(record.fitness is not None for record in records):
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; "
            f"see python run_search.py --status {folder.path}"
        )
    config = schema.load(folder.path / "config.yaml", [])
    has_summary = (folder.path / "summary.json").exists()
    run = Run(
        config=config,
        records=records,
        scale=scale,
        timings=folder.read_timings(),
        environment=folder.read_json("environment.json"),
        ended=str(folder.read_json("status.json")["written"]),
        summary=folder.read_model("summary.json", Summary) if has_summary else None,
        apply=apply_command(folder.path, config),
    )
    folder.write_text("report.html", render(run))
    return folder.is_finished(len(records))


def apply_command(folder: Path, config: Config) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    task = config.all_tasks[0]
    calibration, report = task.calibration, task.report
    unstructured = task.pattern == "unstructured"
    options: dict[str, Sequence[object]] = {
        "model": [task.model],
        "metric": [folder / "best_metric.json"],
        "sparsity": [task.sparsity] if unstructured else [],
        "pattern": [] if unstructured else [task.pattern],
        "corpus": [part.corpus for part in calibration.parts],
        "split": [part.split for part in calibration.parts],
        "share": [part.share for part in calibration.mix],
        "samples": [calibration.windows],
        "seqlen": [calibration.length],
        "seed": [calibration.seed],
        "eval-corpus": [part.corpus for part in report.parts],
        "eval-split": [part.split for part in report.parts],
        "dtype": [task.dtype],
        "out": ["DIR"],
    }
    words = ["python", "run_prune.py"]
    for name, values in options.items():
        for value in values:
            if value is not None:
                words += [f"--{name}", shlex.quote(str(value))]
    return " ".join(words)
