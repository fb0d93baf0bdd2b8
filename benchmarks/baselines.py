"""Perplexity of the named metrics on a model, under a small and a large protocol.

Small: fp32; X and G from 16 random windows of 512 tokens of the WikiText-2 validation text; the
first 6 windows of 1,024 tokens of the test text; half of each row is removed. Large: bf16; 128
random windows of 512 tokens of the first half of the validation text; 7 windows of 1,024 tokens of
the test text, 40,960 tokens apart. Both use statistics of the dense model (one-shot).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from tables import conditions, show, wikitext2_corpora, write_json
from torch import Tensor

from evaluation.corpus import load_text, token_windows
from evaluation.perplexity import perplexity
from pruning.baselines import BASELINES
from pruning.criterion import Criterion
from pruning.masks import Row, Target, group_of
from pruning.metric import Metric
from pruning.models import load_tokenizer
from search.resident import Memory, Resident, Subject

TEST_WINDOW = 1024

LARGE_STARTS = [i * 40960 for i in range(7)]
"""First tokens of the large protocol's test windows."""


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    protocol: Annotated[str, typer.Option(help="small, large or both.")] = "both",
    seed: Annotated[int, typer.Option(help="Seed of the random calibration windows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table for each protocol."""
    figures: dict[str, object] = {"model": model, "seed": seed}
    if protocol in ("small", "both"):
        figures["small"] = _small(model, seed)
    if protocol in ("large", "both"):
        figures["large"] = _large(model, seed)
    write_json(json, figures)


def _small(model: str, seed: int) -> dict[str, object]:
    windows = wikitext2_windows(model, "validation", (16, 512, seed), [i * 1024 for i in range(6)])
    resident = calibrated(model, "float32", windows, frozenset({"X", "G"}))
    perplexities = {"dense": perplexity(resident.dense)}
    for name, baseline in BASELINES.items():
        metric = baseline.criterion.metric
        perplexities[f"{name} row"] = pruned_perplexity(resident, metric, Target(0.5, Row()))
    rows = [[name, f"{value:.1f}"] for name, value in perplexities.items()]
    show(f"small protocol, {model}, float32, 50%", ["metric and group", "perplexity"], rows)
    return {**conditions("float32"), "perplexity": perplexities}


def _large(model: str, seed: int) -> dict[str, object]:
    windows = wikitext2_windows(model, "validation[:50%]", (128, 512, seed), LARGE_STARTS)
    resident = calibrated(model, "bfloat16", windows, frozenset({"X", "G"}))
    cases = [(name, baseline.criterion) for name, baseline in BASELINES.items()]
    cases.append(("snip", Criterion(BASELINES["snip"].criterion.metric, "row")))
    perplexities: dict[str, dict[str, float]] = {}
    for name, criterion in cases:
        targets = [Target(sparsity, group_of(criterion.group)) for sparsity in (0.5, 0.6, 0.7)]
        perplexities[f"{name} {criterion.group}"] = {
            f"{target.sparsity:.0%}": pruned_perplexity(resident, criterion.metric, target)
            for target in targets
        }
    dense = perplexity(resident.dense)
    rows = [
        [name, *(f"{value:.1f}" for value in by_sparsity.values())]
        for name, by_sparsity in perplexities.items()
    ]
    show(
        f"large protocol, {model}, bfloat16, dense {dense:.2f}",
        ["metric and group", "50%", "60%", "70%"],
        rows,
    )
    return {**conditions("bfloat16"), "dense": dense, "perplexity": perplexities}


def wikitext2_windows(
    model: str, calibration_split: str, calibration: tuple[int, int, int], test_starts: list[int]
) -> dict[str, Tensor]:
    """Return windows of WikiText-2 by role.

    Args:
        calibration: Number, length and seed of the random windows of the validation text.
        test_starts: First tokens of the `fitness` windows, in the test text.
    """
    validation, test = wikitext2_corpora()
    tokenizer = load_tokenizer(model)
    windows = token_windows(tokenizer, validation, calibration_split, *calibration)
    ids = torch.tensor(tokenizer(load_text(test, "test"), verbose=False)["input_ids"])
    test_windows = torch.stack([ids[start : start + TEST_WINDOW] for start in test_starts])
    return {"calibration": windows.tokens, "fitness": test_windows}


def calibrated(
    model: str, dtype: str, windows: Mapping[str, Tensor], leaves: frozenset[str]
) -> Resident:
    """Return a resident model with statistics of the `calibration` windows."""
    resident = Resident(Subject(model, dtype), windows, "cpu", "nll", Memory())
    resident.use_statistics(resident.collect_statistics(leaves))
    return resident


def pruned_perplexity(resident: Resident, metric: Metric, target: Target) -> float:
    """Prune the model, leave it pruned, and return its perplexity on the `fitness` windows."""
    resident.prune(metric, target)
    return perplexity(resident.measure(0, None))


if __name__ == "__main__":
    typer.run(main)
