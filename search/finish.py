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
from search.population import Record, State
from search.report import end_table, title_of, write_report
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


def finish(run: Run, records: list[Record], state: State, clock: Callable[[], float]) -> None:
    """Choose the winner, write `best_metric.json`, `summary.json` and `report.html`, print.

    Args:
        records: The whole journal.
        state: The state after it; it has at least one evaluated candidate.
        clock: Seconds since this process began the run.
    """
    run.console.print("scoring the finalists on the selection text")
    winner, standings = _choose(run, state.finalists(run.config.search.finalists))
    run.folder.write_best(winner, run.provenance(candidate=winner.index, selection=standings))
    run.console.print("measuring the winner and the baselines on the report text")
    summary = {
        **_report_measurements(run, winner),
        "selection": standings,
        "candidates": len(records),
        "outcomes": dict(Counter(record.outcome for record in records)),
        "seconds": round(clock(), 1),
        "perplexity_of": {**run.texts["report"], "dtype": run.config.dtype},
        "pruning": run.config.pruning.model_dump(),
    }
    run.folder.write_json("summary.json", summary)
    write_report(run.folder)
    run.console.print(title_of(summary), soft_wrap=True)
    run.console.print(end_table(summary))
    run.console.print(f"best metric: {run.folder.path / 'best_metric.json'}", soft_wrap=True)
    run.console.print(apply_line(run), soft_wrap=True)


def apply_line(run: Run) -> str:
    """Return the command that applies the best metric to the same model and texts."""
    config, pruning, calibration = run.config, run.config.pruning, run.config.calibration
    unstructured = pruning.pattern == "unstructured"
    options = {
        "model": config.model,
        "metric": run.folder.path / "best_metric.json",
        "sparsity": pruning.sparsity if unstructured else None,
        "pattern": None if unstructured else pruning.pattern,
        "corpus": calibration.corpus,
        "split": calibration.split,
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "eval-corpus": config.report.corpus,
        "eval-split": config.report.split,
        "dtype": config.dtype,
        "out": "DIR",
    }
    words = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return "apply it: python run_prune.py " + shlex.join(word for pair in words for word in pair)


def _choose(run: Run, finalists: list[Record]) -> tuple[Record, list[dict[str, Any]]]:
    """Score finalists on the selection text; return the best there, and all with differences."""
    calls = [("selection", record.metric, record.group) for record in finalists]
    losses = run.pool.call_each("losses", calls)
    scored = sorted(
        ((r, found) for r, found in zip(finalists, losses, strict=True) if found),
        key=lambda pair: (sum(pair[1]), pair[0].index),
    )
    reference = scored[0][1]
    standings = []
    for record, found in scored:
        gap = paired_difference(found, reference)
        standings.append(
            {
                "index": record.index,
                "metric": record.metric,
                "group": record.group,
                "size": record.size,
                "fitness": record.fitness,
                "selection_loss": sum(found) / len(found),
                "difference": gap.mean,
                "standard_error": gap.standard_error,
            }
        )
    return scored[0][0], standings


def _report_measurements(run: Run, winner: Record) -> dict[str, Any]:
    calls: list[tuple[Any, ...]] = [
        ("report", winner.metric, winner.group),
        ("report", None, winner.group),
        *(("report", baseline.text, baseline.group) for baseline in BASELINES.values()),
    ]
    best, dense, *baselines = run.pool.call_each("losses", calls)
    found = {name: losses for name, losses in zip(BASELINES, baselines, strict=True) if losses}
    gaps = {name: paired_difference(losses, best) for name, losses in found.items()}
    return {
        "dense": perplexity_of(dense),
        "baselines": {name: perplexity_of(losses) for name, losses in found.items()},
        "best": {
            "metric": winner.metric,
            "perplexity": perplexity_of(best),
            "fitness": winner.fitness,
            "group": winner.group,
            "size": winner.size,
        },
        "behind_best": {
            name: {"nats": gap.mean, "standard_error": gap.standard_error}
            for name, gap in gaps.items()
        },
    }
