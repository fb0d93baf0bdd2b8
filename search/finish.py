"""The end of a run: choose the winner on the selection text, measure it on the report text."""

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
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
from search.report.page import (
    SHOWN,
    end_table,
    relative_rows,
    relative_table,
    render,
    tasks_of,
    title_of,
)
from search.scale import paired_difference, unit_of
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
    """Choose the winner, write `best_metric.json`, `summary.json` and `report.html`, print.

    Args:
        state: The state after the whole journal; it has at least one evaluated candidate.
        diversity: Of the population's masks.
        started: By `time.monotonic`, when this process began the run.
    """
    finalists = state.finalists(experiment.config.search.finalists)
    parts, known = len(experiment.tasks), 1 + len(BASELINES)
    what = "scoring the finalists on the selection text"
    with step(console, what, parts * (known + len(finalists))) as progress:
        winner, standings = _choose(experiment, pool, finalists, progress.advance)
    folder.write_best(winner, experiment.origin(candidate=winner.index, selection=standings))
    what = "measuring the winner and the baselines on the report text"
    with step(console, what, parts * (known + 1 + known)) as progress:
        tasks = [
            {
                **row,
                **_measurements(experiment, pool, index, winner.criterion, progress.advance),
                **_by_layer(pool, index, winner.criterion, progress.advance),
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
    summary["verdict"] = verdict_of(summary)
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


def say_files(folder: RunFolder, config: Config, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply the metric."""
    for name, file in {"report": "report.html", "metric": "best_metric.json"}.items():
        console.print(f"{name}: {folder.path / file}", soft_wrap=True)
    console.print(apply_line(folder.path, config), soft_wrap=True)


def rebuild_report(path: Path, console: Console) -> Ending:
    """Rebuild `report.html` of a run from its other files, also while it goes on."""
    folder = RunFolder.look(path)
    whole = write_report(folder)
    note = "" if whole else ": partial, for the run has not come to its end"
    console.print(f"wrote {path / 'report.html'}{note}", soft_wrap=True)
    return Ending(DONE, "written" if whole else "written, partial", path)


def write_report(folder: RunFolder) -> bool:
    """Rebuild `report.html` from the run folder's other files; tell whether the run is finished.

    Raises:
        FolderError: If nothing is evaluated yet, or a file is damaged.
    """
    # Without the lock: whoever works in the folder goes on, and only whole lines are read.
    records = folder.records_so_far()
    whole = folder.is_finished(len(records))
    summary = folder.read_json("summary.json", *SHOWN) if whole else _partial(folder, records)
    folder.write_text("report.html", render(summary, records, folder.read_timings()))
    return whole


def _partial(folder: RunFolder, records: Sequence[Record]) -> dict[str, Any]:
    """Return what is known of a run before its end, in the shape of a summary.

    Raises:
        FolderError: If nothing is evaluated yet.
    """
    evaluated = [record for record in records if record.fitness is not None]
    if not evaluated:
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; "
            f"see {called('run_search')} --status {folder.path}"
        )
    config = schema.load(folder.path / "config.yaml", [])
    best = min(evaluated, key=lambda record: (record.fitness, record.index))
    cells = [kind for task in config.all_tasks for kind in task.fitness.parts]
    timings = folder.read_timings().values()
    return {
        "partial": f"{len(records)} of {config.search.candidates} candidates",
        "best": {
            "metric": best.criterion.text,
            "fitness": best.fitness,
            "group": best.criterion.group,
            "size": best.size,
        },
        "candidates": len(records),
        "outcomes": dict(Counter(record.outcome.kind for record in records)),
        "seconds": round(sum(timing.get("seconds", 0.0) for timing in timings), 1),
        "selection": [],
        "objective": config.search.objective,
        "aggregate": config.search.aggregate,
        "fitness_unit": unit_of(len(cells)),
    }


def apply_line(folder: Path, config: Config) -> str:
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
    return f"apply it: {called('run_prune')} {command}"


def _choose(
    experiment: Experiment, pool: Pool, finalists: list[Record], done: Count
) -> tuple[Record, list[dict[str, Any]]]:
    """Score finalists on the selection texts; return the best there, and all with differences."""
    tasks = range(len(experiment.tasks))
    aggregate = experiment.config.search.aggregate
    ask = partial(pool.losses, done=done)
    scale = scale_of(experiment.setup, aggregate, ask, "selection")
    requests = [
        LossRequest(task, "selection", record.criterion) for record in finalists for task in tasks
    ]
    answers = iter(ask(requests))
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
    experiment: Experiment, pool: Pool, index: int, winner: Criterion, done: Count
) -> dict[str, Any]:
    """Return a task's perplexities on its report text: dense, baselines and winner."""
    ask = partial(pool.losses, done=done)
    dense, found = losses_of(ask, index, "report")
    (best,) = ask([LossRequest(index, "report", winner)])
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


def _by_layer(pool: Pool, index: int, winner: Criterion, done: Count) -> dict[str, Any]:
    """Return each layer's zeros under the winner and the baselines, and the masks' overlaps."""
    others = {"best": winner} | {name: one.criterion for name, one in BASELINES.items()}
    requests = [MaskRequest(index, winner, other) for other in others.values()]
    found = dict(zip(others, pool.zeros_and_overlap(requests, done), strict=True))
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
