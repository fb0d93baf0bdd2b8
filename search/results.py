"""The end of a search: its winner, chosen and measured, and its results as files and on the screen.

The winner is chosen on the selection text and measured on the report text. `write_report` needs the
run folder alone.
"""

import math
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as ScreenTable

from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.progress import counted, step
from prunevolve.search.evaluator import perplexity_of
from prunevolve.search.experiment import Experiment
from prunevolve.search.factors import without_each
from prunevolve.search.fingerprint import Fingerprints
from prunevolve.search.pool.pool import Pool
from prunevolve.search.population import Record, State
from prunevolve.search.prepare import cells_of, losses_of, read_scale, scale_of
from prunevolve.search.report.report import (
    FOUND,
    Run,
    Table,
    perplexity_table,
    relative_table,
    render,
    title_of,
)
from prunevolve.search.run_folder import FolderError, RunFolder
from prunevolve.search.scale import Scale, paired_difference
from prunevolve.search.status import FINISHED
from prunevolve.search.summary import (
    Diversity,
    FactorWorth,
    Finalist,
    Summary,
    TaskResult,
    Winner,
    verdict_of,
)

_KNOWN = 1 + len(BASELINES)
"""The dense model and the baselines, with which the winner is compared."""

CHART = "fitness.svg"
"""The chart of a run in its folder."""


def finish(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    marks: Fingerprints,
    state: State,
    started: float,
    console: Console,
) -> None:
    """Choose and measure the winner; write and print the results.

    Args:
        state: The state after the whole journal; it has at least one evaluated candidate.
        started: When this process began the run, by `time.monotonic`.
    """
    scale = read_scale(folder)
    assert scale, "prepare comes before the end"
    winner, standings, factors = _choose(experiment, pool, state.finalists(), console)
    selection = [finalist.model_dump() for finalist in standings]
    folder.write_best(winner, experiment.origin(candidate=winner.index, selection=selection))
    tasks = _measure_all(experiment, pool, winner, console)
    members = [record.criterion for record in state.population]
    diversity = marks.diversity(members, experiment.config.search.crowding)
    pruning, leading = experiment.config.pruning.model_dump(), tasks[0]
    outcomes = Counter(record.outcome.kind for record in folder.records())
    summary = Summary(
        verdict=verdict_of(tasks).sentence,
        best=Winner.model_validate(_described(winner) | {"perplexity": leading.best.perplexity}),
        candidates=outcomes.total(),
        outcomes=dict(outcomes),
        pruning=pruning | {"sparsity": leading.sparsity, "pattern": leading.pattern},
        fitness_unit="x best named",
        tasks=tuple(tasks),
        selection=tuple(standings),
        factors=tuple(factors),
        seconds=round(time.monotonic() - started, 1),
        diversity=Diversity.model_validate(diversity),
    )
    folder.write_json("summary.json", summary.to_dict())
    with step(console, "drawing the report"):
        write_report(folder)
    _say_results(summary, console)
    say_files(folder, experiment.config, console)
    status = folder.read_json("status.json")
    folder.write_json("status.json", {**status, "state": FINISHED})


def _described(record: Record) -> dict[str, object]:
    """Return a record's metric, group, size and fitness."""
    criterion = record.criterion
    return {
        "metric": criterion.text,
        "group": criterion.group,
        "size": record.size,
        "fitness": record.fitness,
    }


def _choose(
    experiment: Experiment, pool: Pool, finalists: list[Record], console: Console
) -> tuple[Record, list[Finalist], list[FactorWorth]]:
    """Score finalists on the selection texts; return the best, the standings, and its factors."""
    tasks = experiment.tasks_of("selection")
    total = (len(finalists) + _KNOWN) * len(tasks)
    with counted(console, "finalists", total) as count, pool.counting(count):
        scale = scale_of(experiment, pool.losses, "selection")
        measured = _selection_losses(experiment, pool, [r.criterion for r in finalists])
    scored = [
        (scale.fitness(losses), record.index, record, losses)
        for record, losses in zip(finalists, measured, strict=True)
        if losses
    ]
    if not scored:  # none can prune a model that the search did not see
        return finalists[0], [], []
    scored.sort(key=lambda entry: entry[:2])
    _, _, winner, reference = scored[0]
    standings = []
    for loss, index, record, losses in scored:
        gap = scale.difference(losses, reference)
        compared = {"difference": gap.mean, "standard_error": gap.standard_error}
        fields = {"index": index, **_described(record), "selection_loss": loss, **compared}
        standings.append(Finalist.model_validate(fields))
    return winner, standings, _worths(experiment, pool, scale, winner, reference, console)


def _worths(
    experiment: Experiment,
    pool: Pool,
    scale: Scale,
    winner: Record,
    reference: list[list[float]],
    console: Console,
) -> list[FactorWorth]:
    """Return what the winner's losses on the selection texts, by task, are without each factor."""
    rests = without_each(winner.criterion.metric)
    if not rests:
        return []
    criteria = [Criterion(rest, winner.criterion.group) for rest in rests.values()]
    total = len(rests) * len(experiment.tasks_of("selection"))
    with counted(console, "winner's factors", total) as count, pool.counting(count):
        measured = _selection_losses(experiment, pool, criteria)
    worths = []
    for factor, losses in zip(rests, measured, strict=True):
        fields: dict[str, object] = {"factor": factor}
        if losses:
            gap = scale.difference(losses, reference)
            fields |= {"difference": gap.mean, "standard_error": gap.standard_error}
        worths.append(FactorWorth.model_validate(fields))
    return worths


def _selection_losses(
    experiment: Experiment, pool: Pool, criteria: Sequence[Criterion]
) -> list[list[list[float]]]:
    """Return each criterion's losses on the selection texts, by task; none if it cannot prune."""
    tasks = experiment.tasks_of("selection")
    requests = [(task, "selection", c) for c in criteria for task in tasks]
    answers = iter(pool.losses(requests))
    measured = []
    for _ in criteria:
        losses: list[list[float]] = [[] for _ in experiment.tasks]
        for task, answer in zip(tasks, answers, strict=False):
            losses[task] = answer or []
        complete = all(losses[task] and all(map(math.isfinite, losses[task])) for task in tasks)
        measured.append(losses if complete else [])
    return measured


def _measure_all(
    experiment: Experiment, pool: Pool, winner: Record, console: Console
) -> list[TaskResult]:
    """Measure every task on its report text."""
    places = range(len(experiment.tasks))
    total = len(places) * (1 + _KNOWN)
    with counted(console, "report", total) as count, pool.counting(count):
        return [_measure(experiment, pool, place, winner) for place in places]


def _measure(experiment: Experiment, pool: Pool, index: int, winner: Record) -> TaskResult:
    """Measure a task on its report text: dense, baselines and winner."""
    dense, named = losses_of(pool.losses, index, "report")
    (best,) = pool.losses([(index, "report", winner.criterion)])
    assert best is not None
    gaps = {name: paired_difference(losses, best) for name, losses in named.items()}
    subject, row = experiment.subject_of[index], experiment.task_rows()[index]
    provenance = experiment.provenance(subject)["report"]
    fields = {
        **row,
        "dense": perplexity_of(dense),
        "baselines": {name: perplexity_of(losses) for name, losses in named.items()},
        "best": {"perplexity": perplexity_of(best)},
        "behind_best": {
            name: {"nats": gap.mean, "standard_error": gap.standard_error}
            for name, gap in gaps.items()
        },
        "by_text": [
            {
                "text": cell.text,
                "dense": perplexity_of(cell.dense),
                "named": cell.named,
                "named_perplexity": perplexity_of([named[cell.named][i] for i in cell.windows]),
                "perplexity": perplexity_of([best[i] for i in cell.windows]),
                "relative_rise": cell.value(best),
            }
            for cell in cells_of(experiment, index, "report", dense, named)
        ],
        "perplexity_of": {**provenance, "dtype": experiment.subjects[subject].dtype},
    }
    return TaskResult.model_validate(fields)


def _say_results(summary: Summary, console: Console) -> None:
    """Print the tables of perplexities and the verdict."""
    for task in summary.tasks:
        console.print(title_of(task), soft_wrap=True)
        console.print(_screen_table(perplexity_table(task, summary.best)))
    relative = relative_table(summary)
    if len(relative.rows) > 1:
        console.print(_screen_table(relative))
    console.print(f"{FOUND}: {Metric.parse(summary.best.metric).infix}", soft_wrap=True)
    console.print(f"its text: {summary.best.metric}", soft_wrap=True)
    console.print(f"verdict: {summary.verdict}", soft_wrap=True)


def _screen_table(table: Table) -> ScreenTable:
    """Return a table for the screen, with numbers to the right and without formulas, too wide."""
    shown = ScreenTable()
    columns = [heading for heading in table.headings if heading != "metric"]
    for heading in columns:
        is_text = heading in ("", "task", "text", "group")
        shown.add_column(heading, overflow="fold", justify="left" if is_text else "right")
    for row in table.rows:
        shown.add_row(*row[: len(columns)])
    return shown


def say_files(folder: RunFolder, config: Config, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply the metric."""
    for name, file in {"report": "report.html", "metric": "best_metric.json"}.items():
        console.print(f"{name}: {folder.path / file}", soft_wrap=True)
    summary = folder.read_model("summary.json", Summary)
    console.print(next_step(folder.path, config, summary), soft_wrap=True)


def next_step(folder: Path, config: Config, summary: Summary) -> str:
    """Return the line that says how to apply a metric that won, or how to search on."""
    kind = verdict_of(summary.tasks).kind
    if kind == "better":
        return f"apply it: {apply_command(folder, config)}"
    return f"it did not clearly win: search on with {search_on_command(folder, config)}"


def search_on_command(folder: Path, config: Config) -> str:
    """Return the command that breeds as many candidates again."""
    more = f"search.candidates={2 * config.search.candidates}"
    return f"python run_search.py --resume {shlex.quote(str(folder))} --set {more}"


def write_report(folder: RunFolder) -> bool:
    """Write `report.html` and its chart, `fitness.svg`, from the run folder's other files.

    Returns:
        Whether the run is finished.

    Another process may go on working there: only whole lines of its journal are read.

    Raises:
        FolderError: If nothing is evaluated yet, or a file is damaged.
    """
    # Imported here, so that a search does not load matplotlib when it starts.
    from prunevolve.search.report.charts import fitness_chart

    records, scale = folder.records(), read_scale(folder)
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
        environment=folder.read_json("environment.json"),
        ended=str(folder.read_json("status.json")["written"]),
        summary=folder.read_model("summary.json", Summary) if has_summary else None,
        apply=apply_command(folder.path, config),
        search_on=search_on_command(folder.path, config),
    )
    chart = fitness_chart(run.evaluated, scale)
    folder.write_text(CHART, chart)
    folder.write_text("report.html", render(run, chart))
    return folder.is_finished(len(records))


def apply_command(folder: Path, config: Config) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    task = config.tasks[0]
    calibration, report = task.calibration, task.report
    unstructured = task.pattern == "unstructured"
    options: dict[str, Sequence[object]] = {
        "model": [task.model],
        "metric": [folder / "best_metric.json"],
        "sparsity": [task.sparsity] if unstructured else [],
        "pattern": [] if unstructured else [task.pattern],
        "corpus": calibration.corpus,
        "split": calibration.split,
        "share": calibration.share or [],
        "samples": [calibration.windows],
        "seqlen": [calibration.length],
        "seed": [calibration.seed],
        "eval-corpus": report.corpus,
        "eval-split": report.split,
        "dtype": [task.dtype],
        "out": ["DIR"],
    }
    words = ["python", "run_prune.py"]
    for name, values in options.items():
        for value in values:
            if value is not None:
                words += [f"--{name}", shlex.quote(str(value))]
    return " ".join(words)
