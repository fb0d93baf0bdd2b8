"""The named metrics on the embedded model, and their spread over calibration windows.

Each metric prunes the model at one sparsity with statistics from several random sets of
calibration windows; perplexity is measured on the report part. A difference between two metrics is
meaningful if it is larger than their spread over those sets.
"""

import statistics
from pathlib import Path
from typing import Annotated

import typer
from baselines import pruned_perplexity
from tables import conditions, show, write_json

from evaluation.corpus import token_windows
from evaluation.perplexity import perplexity
from pruning.baselines import BASELINES
from pruning.masks import Target, group_of
from pruning.models import EMBEDDED, load_tokenizer
from search.resident import Memory, Resident, Subject

LENGTH, CALIBRATION_WINDOWS = 256, 32


def main(
    sparsity: Annotated[float, typer.Option(help="Fraction removed.")] = 0.6,
    seeds: Annotated[int, typer.Option(help="Sets of calibration windows.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    tokenizer = load_tokenizer(EMBEDDED)
    report = token_windows(tokenizer, EMBEDDED, "report", None, LENGTH, None).tokens
    cut = (EMBEDDED, "calibration", CALIBRATION_WINDOWS, LENGTH)
    windows = {f"seed {seed}": token_windows(tokenizer, *cut, seed).tokens for seed in range(seeds)}
    subject = Subject(EMBEDDED, "float32")
    resident = Resident(subject, {"fitness": report, **windows}, "cpu", "nll", Memory())
    dense = perplexity(resident.dense)
    perplexities: dict[str, list[float]] = {name: [] for name in BASELINES}
    for role in windows:
        resident.use_statistics(resident.collect_statistics(frozenset({"X", "G"}), role))
        for name, baseline in BASELINES.items():
            metric, group = baseline.criterion.metric, baseline.criterion.group
            target = Target(sparsity, group_of(group))
            perplexities[name].append(pruned_perplexity(resident, metric, target))
    rows = [
        [
            name,
            BASELINES[name].criterion.group,
            f"{statistics.mean(values):.2f}",
            f"{statistics.stdev(values):.2f}" if seeds > 1 else "",
            f"{statistics.mean(values) / dense:.2f}",
        ]
        for name, values in sorted(perplexities.items(), key=lambda item: statistics.mean(item[1]))
    ]
    show(
        f"embedded model, report part ({report.numel()} tokens), {sparsity:.0%}, float32, "
        f"{seeds} calibration seeds, dense {dense:.2f}",
        ["metric", "group", "perplexity", "spread (std)", "times dense"],
        rows,
    )
    figures = {"dense": dense, "sparsity": sparsity, "perplexity": perplexities}
    write_json(json, {**conditions("float32"), **figures})


if __name__ == "__main__":
    typer.run(main)
