"""The end of a run: choose the winner on the selection text, measure it on the report text."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from configs import schema
from configs.schema import Config
from pruning.baselines import BASELINES
from pruning.criterion import Criterion
from search.experiment import Experiment
from search.fitness import perplexity_of
from search.journal import FolderError, RunFolder
from search.pool.protocol import LossRequest, MaskRequest, Pool
from search.population import Record, State
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
from search.scale import Scale, paired_difference
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
    """Choose the winner, write `best_metric.json`, `summary.json` and `report.html`, print.

    Args:
        state: The state after the whole journal; it has at least one evaluated candidate.
        diversity: Of the population's masks.
        started: By `time.monotonic`, when this process began the run.
    """
    console.print("scoring the finalists on the selection text")
    finalists = state.finalists(experiment.config.search.finalists)
    winner, standings = _choose(experiment, pool, finalists)
    folder.write_best(winner, experiment.origin(candidate=winner.index, selection=standings))
    console.print("measuring the winner, the front and the baselines on the report text")
    tasks = [
        {
            **row,
            **_measurements(experiment, pool, index, winner.criterion),
            "front": _perplexities(pool, index, state.pareto_front),
            **_by_layer(pool, index, winner.criterion),
        }
        for index, row in enumerate(experiment.task_rows())
    ]
    outcomes = Counter(record.outcome.kind for record in folder.read_records())
    first = tasks[0]
    summary = {
        **{key: first[key] for key in ("dense", "baselines", "behind_best", "perplexity_of")},
        "best": {
            "metric": winner.criterion.text,
            "perplexity": first["best"]["perplexity"],
            "fitness": winner.fitness,
            "group": winner.criterion.group,
            "size": winner.size,
        },
        "selection": standings,
        "candidates": outcomes.total(),
        "outcomes": dict(outcomes),
        "seconds": round(time.monotonic() - started, 1),
        "pruning": {
            **experiment.config.pruning.model_dump(),
            **{key: first[key] for key in ("sparsity", "pattern")},
        },
        "objective": experiment.config.search.objective,
        "aggregate": experiment.config.search.aggregate,
        "fitness_unit": experiment.fitness_unit,
        "diversity": diversity,
        "tasks": tasks,
    }
    folder.write_json("summary.json", summary)
    write_report(folder)
    for task in tasks_of(summary):
        console.print(title_of(task), soft_wrap=True)
        console.print(end_table(task))
    if len(rows := relative_rows(summary)) > 1:
        console.print(relative_table(rows))
    console.print(f"best metric: {folder.path / 'best_metric.json'}", soft_wrap=True)
    console.print(f"apply it: {apply_command(folder, experiment.config)}", soft_wrap=True)


def write_report(folder: RunFolder) -> None:
    """Rebuild `report.html` from the run folder's other files.

    Raises:
        FolderError: If nothing was evaluated yet, or a file is damaged.
    """
    records = folder.read_records()
    if not any(record.fitness is not None for record in records):
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; see "
            f"run_search.py --status {folder.path}"
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
            apply=apply_command(folder, config) if summary else "",
        )
    folder.write_text("report.html", render(run))


def read_scale(folder: RunFolder) -> Scale | None:
    """Return the scale that a run folder has; None if it was not measured yet.

    Raises:
        FolderError: If the file is damaged.
    """
    path = folder.path / "scale.json"
    if not path.exists():
        return None
    try:
        return Scale.model_validate(folder.read_json(path.name))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise FolderError(f"{path} is damaged at {where or 'its top'}") from error


def _config_of(folder: RunFolder) -> Config | None:
    """Return a run's config; None if this version has no such keys, which a report survives."""
    try:
        return schema.load(folder.path / "config.yaml", [])
    except ValueError:
        return None


def apply_command(folder: RunFolder, config: Config) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    task = config.all_tasks[0]
    calibration, report = task.calibration, task.report
    unstructured = task.pattern == "unstructured"
    options = {
        "model": task.model,
        "metric": folder.path / "best_metric.json",
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
    return "python run_prune.py " + shlex.join(word for pair in words for word in pair)


def _choose(
    experiment: Experiment, pool: Pool, finalists: list[Record]
) -> tuple[Record, list[dict[str, Any]]]:
    """Score finalists on the selection texts; return the best there, and all with differences."""
    tasks = range(len(experiment.tasks))
    aggregate = experiment.config.search.aggregate
    scale = scale_of(experiment.setup, aggregate, pool.losses, "selection")
    requests = [
        LossRequest(task, "selection", record.criterion) for record in finalists for task in tasks
    ]
    answers = iter(pool.losses(requests))
    scored = []
    for record in finalists:
        by_task = [next(answers) for _ in tasks]
        losses = [windows for windows in by_task if windows]
        if len(losses) == len(tasks):
            scored.append((scale.fitness(losses), record, losses))
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
    experiment: Experiment, pool: Pool, index: int, winner: Criterion
) -> dict[str, Any]:
    """Return a task's perplexities on its report text: dense, baselines and winner."""
    dense, found = losses_of(pool.losses, index, "report")
    (best,) = pool.losses([LossRequest(index, "report", winner)])
    assert best is not None
    gaps = {name: paired_difference(losses, best) for name, losses in found.items()}
    subject = experiment.tasks[index].subject
    return {
        "dense": perplexity_of(dense),
        "baselines": {name: perplexity_of(losses) for name, losses in found.items()},
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
                "named_perplexity": perplexity_of([found[cell.named][i] for i in cell.windows]),
                "perplexity": perplexity_of([best[i] for i in cell.windows]),
                "relative_rise": cell.value(best),
            }
            for cell in cells_of(experiment.setup, index, "report", dense, found)
        ],
        "perplexity_of": {
            **experiment.provenance(subject)["report"],
            "dtype": experiment.subjects[subject].dtype,
        },
    }


def _perplexities(pool: Pool, index: int, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return records' perplexities on a task's report text, which decide nothing any more."""
    requests = [LossRequest(index, "report", record.criterion) for record in records]
    return [
        {"index": record.index, "perplexity": perplexity_of(losses)}
        for record, losses in zip(records, pool.losses(requests), strict=True)
        if losses
    ]


def _by_layer(pool: Pool, index: int, winner: Criterion) -> dict[str, Any]:
    """Return each layer's zeros under the winner and the baselines, and the masks' overlaps."""
    others = {"best": winner} | {name: one.criterion for name, one in BASELINES.items()}
    requests = [MaskRequest(index, winner, other) for other in others.values()]
    found = dict(zip(others, pool.zeros_and_overlap(requests), strict=True))
    return {
        "layers": {
            name: {layer: zeros for layer, (zeros, _) in by_layer.items()}
            for name, by_layer in found.items()
        },
        "overlap": {
            name: {layer: overlap for layer, (_, overlap) in by_layer.items()}
            for name, by_layer in found.items()
            if name != "best"
        },
    }
