"""A metric that a search found, beside the named ones: three sparsities, 2:4, other text and model.

The larger protocol of `baselines.py` (bf16; statistics from 128 random windows of 512 tokens of the
WikiText-2 validation text's first half; 7 windows of 1,024 tokens of its test text), at 50%, 60%
and 70% in each metric's own group and at 2:4. For transfer: at 50% on the embedded report text,
documentation of a programming language, and the embedded model with its own texts at 50%.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from baselines import LARGE_STARTS, Bench
from rich.progress import track
from tables import conditions, show, write_json

from evaluation.corpus import token_windows
from evaluation.perplexity import perplexity, window_losses
from pruning.baselines import BASELINES
from pruning.calibration import collect
from pruning.leaves import LEAF_SETS
from pruning.masks import NOfM, Target, group_of
from pruning.memory import keep_freed_memory
from pruning.metric import Metric
from pruning.metric_file import resolve_metric
from pruning.models import EMBEDDED, linear_layers, load_model, load_tokenizer
from pruning.pruner import LayerScores, prune_copy

SPARSITIES = (0.5, 0.6, 0.7)
LEAVES = frozenset(LEAF_SETS["extended"])

Named = dict[str, tuple[Metric, str]]
"""Metric and group by name."""


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    metric: Annotated[list[str], typer.Option(help="Name, file or text; repeatable.")],
    seed: Annotated[int, typer.Option(help="Of the random calibration windows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    keep_freed_memory()
    named: Named = {name: (one.metric, one.group) for name, one in BASELINES.items()}
    for argument in metric:
        found = resolve_metric(argument)
        named[Path(argument).parent.name or argument] = (found.metric, found.group)
    perplexities, dense = _on_model(model, seed, named)
    embedded, embedded_dense = _on_embedded(named)
    for name, value in embedded.items():
        perplexities[name]["embedded 50%"] = value
    columns = list(next(iter(perplexities.values())))
    rows = [
        [name, group, str(one.size), *(f"{perplexities[name][column]:.2f}" for column in columns)]
        for name, (one, group) in named.items()
    ]
    show(
        f"{model}, bfloat16, dense {dense['test']:.2f} on the test text, {dense['other']:.2f} on "
        f"the other; embedded, float32, dense {embedded_dense:.2f}",
        ["metric", "group", "size", *columns],
        rows,
    )
    texts = {name: {"metric": one.text, "group": group} for name, (one, group) in named.items()}
    figures = {"dense": {**dense, "embedded": embedded_dense}, "metrics": texts}
    write_json(json, {**conditions("bfloat16"), **figures, "perplexity": perplexities})


def _on_model(
    model: str, seed: int, named: Named
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    bench = Bench(model, "bfloat16", "validation[:50%]", (128, 512, seed), LARGE_STARTS, LEAVES)
    other = token_windows(load_tokenizer(model), EMBEDDED, "report", 8, 1024, None).tokens
    dense = {"test": bench.dense(), "other": perplexity(window_losses(bench.model, other))}
    found: dict[str, dict[str, float]] = {}
    for name, (metric, group) in track(named.items(), "measuring", transient=True):
        found[name] = {
            f"{sparsity:.0%}": bench.pruned(metric, Target(sparsity, group_of(group)))
            for sparsity in SPARSITIES
        }
        found[name]["2:4"] = bench.pruned(metric, Target(0.5, NOfM(2, 4)))
        bench.pruned(metric, Target(0.5, group_of(group)))
        found[name]["other text 50%"] = perplexity(window_losses(bench.model, other))
    return found, dense


def _on_embedded(named: Named) -> tuple[dict[str, float], float]:
    model, tokenizer = load_model(EMBEDDED, "float32"), load_tokenizer(EMBEDDED)
    layers = linear_layers(model)
    master = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    calibration = token_windows(tokenizer, EMBEDDED, "calibration", 32, 256, 0).tokens
    report = token_windows(tokenizer, EMBEDDED, "report", None, 256, None).tokens
    dense = perplexity(window_losses(model, report))
    statistics = collect(model, layers, calibration, LEAVES)
    found: dict[str, Any] = {}
    for name, (metric, group) in named.items():
        prune_copy(
            layers, master, LayerScores(metric, master, statistics), Target(0.5, group_of(group))
        )
        found[name] = perplexity(window_losses(model, report))
    return found, dense


if __name__ == "__main__":
    typer.run(main)
