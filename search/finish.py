"""The end of a run: choose the winner on the selection text, measure it on the report text."""

import math
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pruning.baselines import BASELINES
from search.fitness import perplexity_of
from search.journal import RunFolder
from search.population import Record, State
from search.report.page import SHOWN, end_table, render, tasks_of, title_of
from search.run import Run


@dataclass(frozen=True)
class Difference:
    """A paired difference of two metrics' losses over the same windows, nats per token.

    Attributes:
        mean: Positive where the first is worse.
        standard_error: Of that mean; None for a single window.
    """

    mean: float
    standard_error: float | None


def paired_difference(losses: list[float], reference: list[float]) -> Difference:
    """Compare two lists of losses window by window: far less noise than in the losses."""
    gap = torch.tensor(losses, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    error = gap.std().item() / math.sqrt(len(gap)) if len(gap) > 1 else None
    return Difference(gap.mean().item(), error)


def finish(
    run: Run,
    records: list[Record],
    state: State,
    diversity: dict[str, Any],
    clock: Callable[[], float],
) -> None:
    """Choose the winner, write `best_metric.json`, `summary.json` and `report.html`, print.

    Args:
        records: The whole journal.
        state: The state after it; it has at least one evaluated candidate.
        diversity: Of the population's masks.
        clock: Seconds since this process began the run.
    """
    run.console.print("scoring the finalists on the selection text")
    winner, standings = _choose(run, state.finalists(run.config.search.finalists))
    run.folder.write_best(winner, run.provenance(candidate=winner.index, selection=standings))
    run.console.print("measuring the winner and the baselines on the report text")
    tasks = [
        {**task, **_measurements(run, index, winner), **_by_layer(run, index, winner)}
        for index, task in enumerate(run.tasks())
    ]
    first = tasks[0]
    summary = {
        **{key: first[key] for key in ("dense", "baselines", "behind_best", "perplexity_of")},
        "best": {
            "metric": winner.metric,
            "perplexity": first["best"]["perplexity"],
            "fitness": winner.fitness,
            "group": winner.group,
            "size": winner.size,
        },
        "selection": standings,
        "candidates": len(records),
        "outcomes": dict(Counter(record.outcome for record in records)),
        "seconds": round(clock(), 1),
        "pruning": {
            **run.config.pruning.model_dump(),
            **{key: first[key] for key in ("sparsity", "pattern")},
        },
        "objective": run.config.search.objective,
        "diversity": diversity,
        "tasks": tasks,
    }
    run.folder.write_json("summary.json", summary)
    write_report(run.folder)
    for task in tasks_of(summary):
        run.console.print(title_of(task), soft_wrap=True)
        run.console.print(end_table(task))
    run.console.print(f"best metric: {run.folder.path / 'best_metric.json'}", soft_wrap=True)
    run.console.print(apply_line(run), soft_wrap=True)


def write_report(folder: RunFolder) -> None:
    """Rebuild `report.html` from the run folder's other files.

    Raises:
        FolderError: If the run has not ended or a file is damaged.
    """
    summary = folder.read_json("summary.json", *SHOWN)
    folder.write_text("report.html", render(summary, folder.read_records(), folder.read_timings()))


def apply_line(run: Run) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    task = run.config.all_tasks[0]
    calibration, report = task.texts["calibration"], task.texts["report"]
    unstructured = task.pattern == "unstructured"
    options = {
        "model": task.model,
        "metric": run.folder.path / "best_metric.json",
        "sparsity": task.sparsity if unstructured else None,
        "pattern": None if unstructured else task.pattern,
        "corpus": calibration.corpus,
        "split": calibration.split,
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "eval-corpus": report.corpus,
        "eval-split": report.split,
        "dtype": task.dtype,
        "out": "DIR",
    }
    words = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return "apply it: python run_prune.py " + shlex.join(word for pair in words for word in pair)


def _choose(run: Run, finalists: list[Record]) -> tuple[Record, list[dict[str, Any]]]:
    """Score finalists on the selection texts; return the best there, and all with differences."""
    tasks = range(len(run.plan.tasks))
    calls = [(i, "selection", one.metric, one.group) for one in finalists for i in tasks]
    found = iter(run.pool.call_each("losses", calls))
    scored = []
    for record in finalists:
        losses = [next(found) for _ in tasks]  # of each task, its windows
        if all(losses):
            scored.append(
                (_weighted(run, [Difference(sum(x) / len(x), 0) for x in losses]), record, losses)
            )
    scored.sort(key=lambda one: (one[0].mean, one[1].index))
    reference = scored[0][2]
    standings = []
    for loss, record, losses in scored:
        gap = _weighted(
            run, [paired_difference(*pair) for pair in zip(losses, reference, strict=True)]
        )
        standings.append(
            {
                "index": record.index,
                "metric": record.metric,
                "group": record.group,
                "size": record.size,
                "fitness": record.fitness,
                "selection_loss": loss.mean,
                "difference": gap.mean,
                "standard_error": gap.standard_error,
            }
        )
    return scored[0][1], standings


def _weighted(run: Run, differences: list[Difference]) -> Difference:
    """Return the mean of the tasks' differences by weight; their errors are independent."""
    weights = [task.weight / sum(t.weight for t in run.plan.tasks) for task in run.plan.tasks]
    pairs = list(zip(weights, differences, strict=True))
    errors = [d.standard_error for d in differences]
    known = [w * e for w, e in zip(weights, errors, strict=True) if e is not None]
    error = math.hypot(*known) if len(known) == len(errors) else None
    return Difference(sum(weight * one.mean for weight, one in pairs), error)


def _measurements(run: Run, index: int, winner: Record) -> dict[str, Any]:
    """Return a task's perplexities on its report text: dense, baselines and winner."""
    task = run.plan.tasks[index]
    calls: list[tuple[Any, ...]] = [
        (index, "report", winner.metric, winner.group),
        (index, "report", None, winner.group),
        *((index, "report", one.text, one.group) for one in BASELINES.values()),
    ]
    best, dense, *baselines = run.pool.call_each("losses", calls)
    found = {name: losses for name, losses in zip(BASELINES, baselines, strict=True) if losses}
    gaps = {name: paired_difference(losses, best) for name, losses in found.items()}
    dtype = run.plan.subjects[task.subject].dtype
    return {
        "dense": perplexity_of(dense),
        "baselines": {name: perplexity_of(losses) for name, losses in found.items()},
        "best": {"perplexity": perplexity_of(best)},
        "behind_best": {
            name: {"nats": gap.mean, "standard_error": gap.standard_error}
            for name, gap in gaps.items()
        },
        "perplexity_of": {**run.texts(task.subject)["report"], "dtype": dtype},
    }


def _by_layer(run: Run, index: int, winner: Record) -> dict[str, Any]:
    """Return each layer's zeros under the winner and the baselines, and the masks' overlaps."""
    own = (winner.metric, winner.group)
    others = {"best": own} | {name: (one.text, one.group) for name, one in BASELINES.items()}
    calls = [(index, own, other) for other in others.values()]
    found = dict(zip(others, run.pool.call_each("zeros_and_overlap", calls), strict=True))
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
