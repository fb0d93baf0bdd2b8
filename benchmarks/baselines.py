"""Perplexity of the named metrics on a model, under a small and a larger protocol.

The small one: fp32; X and G from 16 random windows of 512 tokens of the WikiText-2 validation
text; the first 6 windows of 1,024 tokens of the test text; half of each row. The larger one:
bf16; 128 random windows of 512 tokens of the validation text's first half; 7 windows of 1,024
tokens of the test text, 40,960 tokens apart. All from dense statistics (one-shot).
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tables import conditions, show, wikitext2_corpora, write_json
from torch import Tensor

from evaluation.corpus import load_text, token_windows
from evaluation.perplexity import perplexity, window_losses
from pruning.baselines import BASELINES
from pruning.calibration import Statistics, collect
from pruning.masks import Row, Target, group_of
from pruning.metric import Metric
from pruning.models import linear_layers, load_model, load_tokenizer
from pruning.pruner import LayerScores, prune_copy, restore

TEST_WINDOW = 1024

LARGE_STARTS = [i * 40960 for i in range(7)]
"""First tokens of the larger protocol's test windows."""


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    protocol: Annotated[str, typer.Option(help="small, large or both.")] = "both",
    seed: Annotated[int, typer.Option(help="Of the random calibration windows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table for each protocol."""
    figures: dict[str, Any] = {"model": model, "seed": seed}
    if protocol in ("small", "both"):
        figures["small"] = _small(model, seed)
    if protocol in ("large", "both"):
        figures["large"] = _large(model, seed)
    write_json(json, figures)


def _small(model: str, seed: int) -> dict[str, Any]:
    bench = Bench(model, "float32", "validation", (16, 512, seed), [i * 1024 for i in range(6)])
    found = {"dense": bench.dense()}
    for name, baseline in BASELINES.items():
        found[f"{name} row"] = bench.pruned(baseline.metric, Target(0.5, Row()))
    rows = [[name, f"{value:.1f}"] for name, value in found.items()]
    show(f"small protocol, {model}, float32, 50%", ["metric and group", "perplexity"], rows)
    return {**conditions("float32"), "perplexity": found}


def _large(model: str, seed: int) -> dict[str, Any]:
    bench = Bench(model, "bfloat16", "validation[:50%]", (128, 512, seed), LARGE_STARTS)
    cases = [(name, baseline.metric, baseline.group) for name, baseline in BASELINES.items()]
    cases.append(("snip", BASELINES["snip"].metric, "row"))
    found: dict[str, dict[str, float]] = {}
    for name, metric, group in cases:
        found[f"{name} {group}"] = {
            f"{sparsity:.0%}": bench.pruned(metric, Target(sparsity, group_of(group)))
            for sparsity in (0.5, 0.6, 0.7)
        }
    dense = bench.dense()
    rows = [[name, *(f"{value:.1f}" for value in by.values())] for name, by in found.items()]
    show(
        f"larger protocol, {model}, bfloat16, dense {dense:.2f}",
        ["metric and group", "50%", "60%", "70%"],
        rows,
    )
    return {**conditions("bfloat16"), "dense": dense, "perplexity": found}


class Bench:
    """A model with its statistics and test windows; prunes from a master copy."""

    def __init__(
        self,
        model: str,
        dtype: str,
        calibration_split: str,
        calibration: tuple[int, int, int],
        test_starts: list[int],
        leaves: frozenset[str] = frozenset({"X", "G"}),
    ) -> None:
        validation, test = wikitext2_corpora()
        tokenizer = load_tokenizer(model)
        count, length, seed = calibration
        windows = token_windows(tokenizer, validation, calibration_split, count, length, seed)
        self.model = load_model(model, dtype)
        self.layers = linear_layers(self.model)
        self.master = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self.statistics: Statistics = collect(self.model, self.layers, windows.tokens, leaves)
        ids = torch.tensor(tokenizer(load_text(test, "test"), verbose=False)["input_ids"])
        self.test: Tensor = torch.stack([ids[s : s + TEST_WINDOW] for s in test_starts])

    def pruned(self, metric: Metric, target: Target) -> float:
        scores = LayerScores(metric, self.master, self.statistics)
        prune_copy(self.layers, self.master, scores, target)
        return perplexity(window_losses(self.model, self.test))

    def dense(self) -> float:
        restore(self.layers, self.master)
        return perplexity(window_losses(self.model, self.test))


if __name__ == "__main__":
    typer.run(main)
