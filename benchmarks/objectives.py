"""NLL or KL divergence: which ranks candidates better from few tokens?

Candidates of a real run are measured with both objectives on the first windows of the fitness
text, and with NLL on the selection text, which serves as the truth. The table shows each one's rank
correlation with that truth, among all candidates and among the better half, where it matters.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from real_run import RealRun
from rich.progress import track
from tables import conditions, rank_correlation, show, write_json
from torch import Tensor

from evaluation.divergence import final_hidden, window_divergences
from search.fitness import Evaluator
from search.population import Record

WINDOWS = (1, 2, 4, 8, 16, 32)


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a search.")],
    candidates: Annotated[int, typer.Option(help="Evaluated candidates to compare.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    real = RealRun(run)
    evaluator = real.evaluator(replace(real.experiment.setup, stages=()))
    evaluated = [record for record in real.records if record.fitness is not None]
    sample = random.Random(seed).sample(evaluated, min(candidates, len(evaluated)))
    nll, kl, truth = _measure(evaluator, sample)
    better = truth.argsort()[: len(truth) // 2]
    counts = [count for count in WINDOWS if count <= nll.shape[1]]
    length = evaluator.residents[0].windows["fitness"].shape[1]
    tokens = [count * length for count in counts]
    correlations: dict[str, list[float]] = {}
    for name, losses in (("nll", nll), ("kl", kl)):
        means = [losses[:, :count].mean(1) for count in counts]
        correlations[name] = [rank_correlation(mean.tolist(), truth.tolist()) for mean in means]
        correlations[f"{name}_better_half"] = [
            rank_correlation(mean[better].tolist(), truth[better].tolist()) for mean in means
        ]
    columns = ("nll", "kl", "nll_better_half", "kl_better_half")
    rows = [
        [str(count), *(f"{correlations[column][i]:.3f}" for column in columns)]
        for i, count in enumerate(tokens)
    ]
    show(
        f"rank correlation with NLL on the selection text, {len(truth)} candidates of {run.name}",
        ["fitness tokens", "NLL", "KL", "NLL, better half", "KL, better half"],
        rows,
    )
    figures = {"candidates": len(truth), "tokens": tokens, **correlations}
    write_json(json, {**conditions(real.experiment.config.dtype), **figures})


def _measure(evaluator: Evaluator, sample: list[Record]) -> tuple[Tensor, Tensor, Tensor]:
    """Return each candidate's NLL and KL by fitness window, (N, windows), and the truth, (N,)."""
    resident, task = evaluator.residents[0], evaluator.setup.tasks[0]
    windows = resident.windows["fitness"]
    hidden = final_hidden(resident.store, windows)
    rows = []
    for record in track(sample, "measuring", transient=True):
        criterion = record.criterion
        with resident.pruned(criterion.metric, task.target(criterion.group)):
            divergences = window_divergences(resident.store, windows, hidden)
            selection = torch.tensor(resident.losses("selection"))
            rows.append((resident.measure(0, None), divergences, selection.mean()))
    nll, kl, truth = (torch.stack(column) for column in zip(*rows, strict=True))
    return nll, kl, truth


if __name__ == "__main__":
    typer.run(main)
