"""Are early decisions right? Evaluate the candidates of a real run in full.

A run decides most candidates early: one with a known mask on the probe is a duplicate, and one that
is far behind after a few windows is stopped. This benchmark prunes and measures the same candidates
in full. It compares the full masks of each pair with the same fingerprint, and counts the stopped
candidates whose full fitness would have entered the run's final top ten.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from real_run import RealRun
from rich.progress import track
from tables import conditions, show_figures, write_json

from prunevolve.pruning.masks import DegenerateScores
from prunevolve.search.fitness import Evaluator
from prunevolve.search.population import Candidate, Record

TOP, MOST_PAIRS = 10, 60


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a search.")],
    candidates: Annotated[int, typer.Option(help="Candidates to evaluate in full.")] = 80,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    real = RealRun(run)
    never_stopping = replace(real.experiment.setup, stages=())
    evaluator = real.evaluator(never_stopping)
    draw = random.Random(0)
    twins = _twins(real.records)
    differing = _compare(evaluator, draw.sample(twins, min(MOST_PAIRS, len(twins))))
    decided = [r for r in real.records if r.outcome.kind in ("evaluated", "stopped")]
    best = sorted(r.fitness for r in decided if r.fitness is not None)[:TOP]
    sample = draw.sample(decided, min(candidates, len(decided)))
    full = _evaluate(evaluator, sample)
    stopped = [record for record in sample if record.outcome.kind == "stopped"]
    wrong = [record for record in stopped if full[record] < best[-1]]
    errors: dict[bool, list[float]] = {True: [], False: []}  # by whether the run estimated it
    for record in sample:
        if record.fitness is not None:
            error = abs(full[record] - record.fitness)
            errors[bool(record.outcome.reason)].append(error)
    figures: dict[str, float | None] = {
        "run_candidates": len(real.records),
        "fingerprint_pairs": len(differing),
        "mask_disagreements": sum(fraction > 0 for fraction in differing),
        "largest_disagreement": max(differing, default=0.0),
        "evaluated_in_full": len(full),
        "stopped": len(stopped),
        "wrongly_stopped": len(wrong),
        "nearest_stopped": min((full[r] - best[-1] for r in stopped), default=None),
        "not_measured_to_the_end": len(errors[True]),
        "largest_error_of_an_estimate": max(errors[True], default=None),
        "largest_difference_to_the_run": max(errors[False], default=None),
    }
    title = f"early decisions of {run.name}, top {TOP} at {best[-1]:.4f}"
    show_figures(title, figures, {})
    write_json(json, {**conditions(real.experiment.config.dtype), **figures})


def _twins(records: list[Record]) -> list[tuple[Record, Record]]:
    """Return the pairs whose masks the run took for equal by their fingerprints."""
    return [
        (record, records[int(record.outcome.reason.split()[-1])])
        for record in records
        if record.outcome.kind == "duplicate" and record.outcome.reason.startswith("same mask")
    ]


@torch.inference_mode()
def _compare(evaluator: Evaluator, pairs: list[tuple[Record, Record]]) -> list[float]:
    """Return for each pair the fraction of all weights that only one of the two removes."""
    fractions = []
    for records in track(pairs, "comparing full masks", transient=True):
        differing = total = 0
        for task in evaluator.setup.tasks:
            resident = evaluator.residents[task.subject]
            criteria = [record.criterion for record in records]
            masks = [resident.masks(c.metric, task.target(c.group)) for c in criteria]
            try:
                for (_, a), (_, b) in zip(*masks, strict=True):
                    differing += int((a ^ b).sum())
                    total += a.numel()
            except DegenerateScores:
                # One is degenerate on a layer outside the probe, so it is no competitor.
                differing, total = differing + 1, total + 1
        fractions.append(differing / total)
    return fractions


def _evaluate(evaluator: Evaluator, sample: list[Record]) -> dict[Record, float]:
    fitness = {}
    for record in track(sample, "evaluating in full", transient=True):
        outcome = evaluator.evaluate(Candidate(record.index, record.criterion))
        fitness[record] = float("inf") if outcome.fitness is None else outcome.fitness
    return fitness


if __name__ == "__main__":
    typer.run(main)
