"""A metric that a search found, beside the named ones: three sparsities, 2:4, other text and model.

The larger protocol of `baselines.py` (bf16; statistics from 128 random windows of 512 tokens of the
WikiText-2 validation text's first half; 7 windows of 1,024 tokens of its test text), at 50%, 60%
and 70% in each metric's own group and at 2:4. For transfer: at 50% on the embedded report text,
documentation of a programming language, and the embedded model with its own texts at 50%.
"""

from pathlib import Path
from typing import Annotated

import typer
from baselines import LARGE_STARTS, calibrated, pruned_perplexity, wikitext2_windows
from rich.progress import track
from tables import conditions, show, write_json

from evaluation.corpus import token_windows
from evaluation.perplexity import perplexity
from pruning.baselines import BASELINES
from pruning.criterion import Criterion
from pruning.leaves import LEAF_SETS
from pruning.masks import NOfM, Target, group_of
from pruning.memory import keep_freed_memory
from pruning.metric_file import resolve_metric
from pruning.models import EMBEDDED, load_tokenizer
from search.fitness import perplexity_of

SPARSITIES = (0.5, 0.6, 0.7)
LEAVES = frozenset(LEAF_SETS["extended"])

Named = dict[str, Criterion]
"""What is compared, by name."""


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    metric: Annotated[list[str], typer.Option(help="Name, file or text; repeatable.")],
    seed: Annotated[int, typer.Option(help="Of the random calibration windows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    keep_freed_memory()
    named: Named = {name: baseline.criterion for name, baseline in BASELINES.items()}
    for argument in metric:
        named[Path(argument).parent.name or argument] = resolve_metric(argument).criterion
    perplexities, dense = _on_model(model, seed, named)
    embedded, embedded_dense = _on_embedded(named)
    for name, value in embedded.items():
        perplexities[name]["embedded 50%"] = value
    columns = list(next(iter(perplexities.values())))
    rows = [
        [
            *(name, criterion.group, str(criterion.metric.size)),
            *(f"{perplexities[name][column]:.2f}" for column in columns),
        ]
        for name, criterion in named.items()
    ]
    show(
        f"{model}, bfloat16, dense {dense['test']:.2f} on the test text, {dense['other']:.2f} on "
        f"the other; embedded, float32, dense {embedded_dense:.2f}",
        ["metric", "group", "size", *columns],
        rows,
    )
    texts = {name: {"metric": c.text, "group": c.group} for name, c in named.items()}
    figures = {"dense": {**dense, "embedded": embedded_dense}, "metrics": texts}
    write_json(json, {**conditions("bfloat16"), **figures, "perplexity": perplexities})


def _on_model(
    model: str, seed: int, named: Named
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    windows = wikitext2_windows(model, "validation[:50%]", (128, 512, seed), LARGE_STARTS)
    other = token_windows(load_tokenizer(model), EMBEDDED, "report", 8, 1024, None).tokens
    resident = calibrated(model, "bfloat16", {**windows, "other": other}, LEAVES)

    def on_other() -> float:
        return perplexity_of(resident.losses("other"))

    dense = {"test": perplexity(resident.dense), "other": on_other()}
    found: dict[str, dict[str, float]] = {}
    for name, criterion in track(named.items(), "measuring", transient=True):
        group = group_of(criterion.group)
        targets = {f"{sparsity:.0%}": Target(sparsity, group) for sparsity in SPARSITIES}
        targets["2:4"] = Target(0.5, NOfM(2, 4))
        found[name] = {
            column: pruned_perplexity(resident, criterion.metric, target)
            for column, target in targets.items()
        }
        resident.prune(criterion.metric, targets["50%"])
        found[name]["other text 50%"] = on_other()
    return found, dense


def _on_embedded(named: Named) -> tuple[dict[str, float], float]:
    tokenizer = load_tokenizer(EMBEDDED)
    windows = {
        "calibration": token_windows(tokenizer, EMBEDDED, "calibration", 32, 256, 0).tokens,
        "fitness": token_windows(tokenizer, EMBEDDED, "report", None, 256, None).tokens,
    }
    resident = calibrated(EMBEDDED, "float32", windows, LEAVES)
    found = {
        name: pruned_perplexity(resident, criterion.metric, Target(0.5, group_of(criterion.group)))
        for name, criterion in named.items()
    }
    return found, perplexity(resident.dense)


if __name__ == "__main__":
    typer.run(main)
