"""The end of a run: choose the winner on the selection text and measure it on the report text."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from command_line import DONE, called
from configs import schema
from configs.schema import Config
from pruning.baselines import BASELINES
from pruning.criterion import Criterion
from search.ending import Ending
from search.experiment import Experiment
from search.fitness import perplexity_of
from search.journal import FolderError, RunFolder
from search.pool.protocol import Count, LossRequest, MaskRequest, Pool
from search.population import Record, State
from search.prepare import read_scale
from search.report.page import (
    SHOWN,
    end_table,
    relative_rows,
    relative_table,
    render,
    tasks_of,
    title_of,
)
from search.report.run import Run
from search.scale import paired_difference
from search.screen import step
from search.verdict import verdict_of
from search.yardstick import cells_of, losses_of, scale_of


def finish(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    state: State,
    diversity: Mapping[str, float],
    started: float,
    console: Console,
) -> None:
    """Choose the winner, write `best_metric.json`, `summary.json` and `report.html`, and print.

    Args:
        state: The state after the whole journal; it has at least one evaluated candidate.
        diversity: The diversity of the population's masks.
        started: When this process began the run, by `time.monotonic`.
    """
    finalists = state.finalists(experiment.config.search.finalists)
    task_count, known = len(experiment.tasks), 1 + len(BASELINES)
    title = "scoring the finalists on the selection text"
    choosing = len(experiment.setup.tasks_of("selection"))
    with step(console, title, choosing * (known + len(finalists))) as progress:
        winner, standings = _choose(experiment, pool, finalists, progress.advance)
    folder.write_best(winner, experiment.origin(candidate=winner.index, selection=standings))
    front = state.pareto_front
    title = "measuring the winner, the front and the baselines on the report text"
    with step(console, title, task_count * (known + 1 + len(front) + known)) as progress:
        tasks = [
            {
                **row,
                **_measurements(experiment, pool, index, winner.criterion, progress.advance),
                "front": _perplexities(pool, index, front, progress.advance),
                **_by_layer(pool, index, winner.criterion, progress.advance),
            }
            for index, row in enumerate(experiment.task_rows())
        ]
    summary = _summary(experiment, folder.read_records(), winner, tasks)
    summary |= {
        "selection": standings,
        "seconds": round(time.monotonic() - started, 1),
        "diversity": diversity,
    }
    summary["verdict"] = verdict_of(summary).sentence
    folder.write_json("summary.json", summary)
    with step(console, "drawing the report"):
        write_report(folder)
    for task in tasks_of(summary):
        console.print(title_of(task), soft_wrap=True)
        console.print(end_table(task))
    if len(rows := relative_rows(summary)) > 1:
        console.print(relative_table(rows))
    console.print(f"verdict: {summary['verdict']}", soft_wrap=True)
    say_files(folder, experiment.config, console)


def _summary(
    experiment: Experiment,
    records: Sequence[Record],
    winner: Record,
    tasks: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the summary, which leads with the first task's results."""
    outcomes = Counter(record.outcome.kind for record in records)
    first = tasks[0]
    return {
        **{key: first[key] for key in ("dense", "baselines", "behind_best", "perplexity_of")},
        "best": {
            "metric": winner.criterion.text,
            "perplexity": first["best"]["perplexity"],
            "fitness": winner.fitness,
            "group": winner.criterion.group,
            "size": winner.size,
        },
        "candidates": outcomes.total(),
        "outcomes": dict(outcomes),
        "pruning": {
            **experiment.config.pruning.model_dump(),
            **{key: first[key] for key in ("sparsity", "pattern")},
        },
        "objective": experiment.config.search.objective,
        "aggregate": experiment.config.search.aggregate,
        "fitness_unit": experiment.fitness_unit,
        "tasks": tasks,
    }


def say_files(folder: RunFolder, config: Config, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply the metric."""
    for name, file in {"report": "report.html", "metric": "best_metric.json"}.items():
        console.print(f"{name}: {folder.path / file}", soft_wrap=True)
    console.print(f"apply it: {apply_command(folder.path, config)}", soft_wrap=True)


def rebuild_report(path: Path, console: Console) -> Ending:
    """Rebuild a run's `report.html` from its other files, even while it is running."""
    folder = RunFolder.look(path)
    is_finished = write_report(folder)
    note = "" if is_finished else ": partial, because the run has not ended"
    console.print(f"wrote {path / 'report.html'}{note}", soft_wrap=True)
    return Ending(DONE, "written" if is_finished else "written, partial", path)


def write_report(folder: RunFolder) -> bool:
    """Rebuild `report.html` from the run folder's other files; return whether the run is finished.

    Raises:
        FolderError: If nothing is evaluated yet, or a file is damaged.
    """
    # Without the lock: another process may go on working there, since only whole lines are read.
    records = folder.records_so_far()
    if not any(record.fitness is not None for record in records):
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; "
            f"see {called('run_search')} --status {folder.path}"
        )
    summary, environment, status = (
        folder.read_json(name, *keys) if (folder.path / name).exists() else {}
        for name, keys in (("summary.json", SHOWN), ("environment.json", ()), ("status.json", ()))
    )
    run = Run(
        records=records,
        summary=summary,
        timings=folder.read_timings(),
        scale=read_scale(folder),
        environment=environment,
        ended=str(status.get("written", "")),
    )
    if config := _config_of(folder):
        run = replace(
            run,
            tasks=[
                {"model": task.model, "sparsity": task.sparsity, "pattern": task.pattern}
                for task in config.all_tasks
            ],
            objective=config.search.objective,
            config=schema.to_yaml(config),
            seed=config.search.seed,
            apply=apply_command(folder.path, config) if summary else "",
        )
    folder.write_text("report.html", render(run))
    return folder.is_finished(len(records))


def _config_of(folder: RunFolder) -> Config | None:
    """Return a run's config; None if this version cannot load it: the report does without."""
    try:
        return schema.load(folder.path / "config.yaml", [])
    except ValueError:
        return None


def apply_command(folder: Path, config: Config) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    task = config.all_tasks[0]
    calibration, report = task.calibration, task.report
    unstructured = task.pattern == "unstructured"
    options = {
        "model": task.model,
        "metric": folder / "best_metric.json",
        "sparsity": task.sparsity if unstructured else None,
        "pattern": None if unstructured else task.pattern,
        "corpus": [part.corpus for part in calibration.parts],
        "split": [part.split for part in calibration.parts],
        "share": [part.share for part in calibration.mix],
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "eval-corpus": [part.corpus for part in report.parts],
        "eval-split": [part.split for part in report.parts],
        "dtype": task.dtype,
        "out": "DIR",
    }
    words = [
        (f"--{name}", str(value))
        for name, values in options.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    command = shlex.join(word for pair in words for word in pair)
    return f"{called('run_prune')} {command}"


def _choose(
    experiment: Experiment, pool: Pool, finalists: list[Record], done: Count
) -> tuple[Record, list[dict[str, Any]]]:
    """Score finalists on the selection texts; return the best, and the standings of all."""
    tasks = experiment.setup.tasks_of("selection")
    aggregate = experiment.config.search.aggregate
    ask = partial(pool.losses, done=done)
    scale = scale_of(experiment.setup, aggregate, ask, "selection")
    requests = [
        LossRequest(task, "selection", record.criterion) for record in finalists for task in tasks
    ]
    answers = iter(ask(requests))
    scored = []
    for record in finalists:
        losses: list[list[float]] = [[] for _ in experiment.tasks]
        for task in tasks:
            answer = next(answers)
            losses[task] = answer or []
        if all(losses[task] for task in tasks):
            scored.append((scale.fitness(losses), record, losses))
    if not scored:  # none can prune a model that the search did not see
        return finalists[0], []
    scored.sort(key=lambda entry: (entry[0], entry[1].index))
    reference = scored[0][2]
    standings = []
    for loss, record, losses in scored:
        gap = scale.difference(losses, reference)
        standings.append(
            {
                "index": record.index,
                "metric": record.criterion.text,
                "group": record.criterion.group,
                "size": record.size,
                "fitness": record.fitness,
                "selection_loss": loss,
                "difference": gap.mean,
                "standard_error": gap.standard_error,
            }
        )
    return scored[0][1], standings


def _measurements(
    experiment: Experiment, pool: Pool, index: int, winner: Criterion, done: Count
) -> dict[str, Any]:
    """Return a task's perplexities on its report text: dense, baselines and winner."""
    ask = partial(pool.losses, done=done)
    dense, named = losses_of(ask, index, "report")
    (best,) = ask([LossRequest(index, "report", winner)])
    assert best is not None
    gaps = {name: paired_difference(losses, best) for name, losses in named.items()}
    subject = experiment.tasks[index].subject
    return {
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
            for cell in cells_of(experiment.setup, index, "report", dense, named)
        ],
        "perplexity_of": {
            **experiment.provenance(subject)["report"],
            "dtype": experiment.subjects[subject].dtype,
        },
    }


def _perplexities(
    pool: Pool, index: int, records: Sequence[Record], done: Count
) -> list[dict[str, Any]]:
    """Return records' perplexities on a task's report text; they no longer affect any choice."""
    requests = [LossRequest(index, "report", record.criterion) for record in records]
    return [
        {"index": record.index, "perplexity": perplexity_of(losses)}
        for record, losses in zip(records, pool.losses(requests, done), strict=True)
        if losses
    ]


def _by_layer(pool: Pool, index: int, winner: Criterion, done: Count) -> dict[str, Any]:
    """Return each layer's zeros under the winner and the baselines, and the masks' overlaps."""
    criteria = {"best": winner} | {name: known.criterion for name, known in BASELINES.items()}
    requests = [MaskRequest(index, winner, criterion) for criterion in criteria.values()]
    comparisons = dict(zip(criteria, pool.zeros_and_overlap(requests, done), strict=True))
    return {
        "layers": {
            name: {layer: zeros for layer, (zeros, _) in by_layer.items()}
            for name, by_layer in comparisons.items()
        },
        "overlap": {
            name: {layer: overlap for layer, (_, overlap) in by_layer.items()}
            for name, by_layer in comparisons.items()
            if name != "best"
        },
    }
