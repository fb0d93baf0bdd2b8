"""The effect of rounding statistics: masks and perplexity with G and M in bf16 or fp16, not fp32.

Statistics are collected once in fp32, from random windows of the first half of the WikiText-2
validation text. Each metric then prunes half of the weights in its own group with these statistics,
with the matrices G and M rounded to bf16 (`memory.statistics: bfloat16`), with X rounded as well,
and with all of them in fp16. Perplexity is over a few windows of the WikiText-2 test text, and of
the embedded report text, which is documentation of a programming language.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from tables import conditions, show, wikitext2_corpora, write_json
from torch import Tensor

from evaluation.corpus import token_windows
from evaluation.perplexity import perplexity, window_losses
from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.leaves import LEAVES, Statistics
from pruning.masks import DegenerateScores, Target, group_of, select
from pruning.memory import keep_freed_memory
from pruning.models import EMBEDDED, load_model, load_tokenizer
from pruning.operators import MATRIX
from pruning.recipe import LayerScores
from pruning.store import ResidentStore
from pruning.walk import collect

FOUND = "mul(exp(mul(0.48, tanh(mul(2, colmean(quot(M, G)))))), mul(G, W))"
"""The winner of a search on SmolLM2; its group is `model`."""

_BASELINES = ("snip", "gblm", "pruner-zero", "wanda", "movement")
CRITERIA = {name: NAMED[name].criterion for name in _BASELINES}
CRITERIA["found"] = Criterion.parse(FOUND, "model")

ROUNDINGS = {
    "bf16": (torch.bfloat16, False),
    "bf16, X too": (torch.bfloat16, True),
    "fp16, X too": (torch.float16, True),
}
"""By name, the dtype and whether vectors are rounded as well as matrices."""

SPARSITY = 0.5

Cases = dict[str, dict[str, float] | None]
"""By kind of statistics, the share of weights whose masks differ, and the perplexities; None if a
score is not finite."""


@dataclass
class Bench:
    """A model in memory, its dense weights, and the texts to measure it on."""

    store: ResidentStore
    dense: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]

    def masks(self, criterion: Criterion, statistics: Statistics) -> dict[str, Tensor] | None:
        """Return all masks by layer; None if a score is not finite."""
        scores = LayerScores(criterion.metric, self.dense, statistics.of)
        try:
            return dict(select(scores, Target(SPARSITY, group_of(criterion.group))))
        except DegenerateScores:
            return None

    def perplexities(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the perplexity of each text under masks, which are True for removed weights."""
        self.store.restore({name: self.dense[name] * ~mask for name, mask in masks.items()})
        return {
            name: perplexity(window_losses(self.store, windows))
            for name, windows in self.texts.items()
        }


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    windows: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.")] = 32,
    validation: Annotated[
        str, typer.Option(help="Text file for calibration; default WikiText-2's validation text.")
    ] = "",
    test: Annotated[
        str, typer.Option(help="Text file for tests; default WikiText-2's test text.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the random calibration windows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    keep_freed_memory()
    corpora = wikitext2_corpora()
    validation, test = validation or corpora[0], test or corpora[1]
    tokenizer = load_tokenizer(model)
    calibration = token_windows(tokenizer, validation, "validation[:50%]", windows, 256, seed)
    texts = {
        "test": token_windows(tokenizer, test, "test", 4, 512, None).tokens,
        "other": token_windows(tokenizer, EMBEDDED, "report", 4, 512, None).tokens,
    }
    store = ResidentStore(load_model(model, "float32"))
    statistics = collect(store, calibration.tokens, frozenset("GMX"))
    bench = Bench(store, store.copies(), texts)
    no_masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in bench.dense.items()}
    dense = bench.perplexities(no_masks)
    results = {
        name: _compare(bench, criterion, statistics)
        for name, criterion in track(CRITERIA.items(), "measuring", transient=True)
    }
    show(
        f"{model}, float32 passes, {SPARSITY:.0%}, dense {dense['test']:.2f} on the test text, "
        f"{dense['other']:.2f} on the other; differing: weights per million",
        ["metric", "group", "statistics", "differing", "test", "other text"],
        [row for name, cases in results.items() for row in _rows(name, cases)],
    )
    figures = {"model": model, "calibration": calibration.provenance, "dense": dense}
    write_json(json, {**conditions("float32"), **figures, "metrics": results})


def _compare(bench: Bench, criterion: Criterion, statistics: Statistics) -> Cases:
    exact = bench.masks(criterion, statistics)
    assert exact is not None, criterion
    cases: Cases = {"fp32": {"differing": 0.0, **bench.perplexities(exact)}}
    total = sum(mask.numel() for mask in exact.values())
    for name, (dtype, vectors_too) in ROUNDINGS.items():
        masks = bench.masks(criterion, _rounded(statistics, dtype, vectors_too))
        if masks is None:
            cases[name] = None
            continue
        share = sum(int((masks[layer] ^ mask).sum()) for layer, mask in exact.items()) / total
        cases[name] = {"differing": share, **bench.perplexities(masks)}
    return cases


def _rounded(statistics: Statistics, dtype: torch.dtype, vectors_too: bool) -> Statistics:
    return Statistics(
        {
            leaf: {
                layer: tensor.to(dtype) if vectors_too or LEAVES[leaf].shape == MATRIX else tensor
                for layer, tensor in layers.items()
            }
            for leaf, layers in statistics.items()
        }
    )


def _rows(name: str, cases: Cases) -> list[list[str]]:
    group = CRITERIA[name].group
    return [
        [name, group, kind, "not finite", "", ""]
        if case is None
        else [
            *(name, group, kind, f"{1e6 * case['differing']:.1f}"),
            *(_text(case["test"]), _text(case["other"])),
        ]
        for kind, case in cases.items()
    ]


def _text(value: float) -> str:
    return f"{value:.3f}" if value < 1e6 else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
