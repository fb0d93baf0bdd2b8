"""The README.md of a pruned model: what was removed, by which score, and what it cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pruning.leaves import LEAVES
from pruning.metric import Metric

CARD = """---
{data}
---

# {base}, pruned: {pattern}, {sparsity:.1%} zeros

In every linear layer of the decoder blocks the weights with the lowest score are zero; all other
weights are those of the base model, and its license applies.

- Score: `{metric}`, where
{leaves}
- Weights compete within: {group}
- Calibrated on: {calibration}

| model | perplexity ({place}) |
|---|---|
| dense | {dense} |
| pruned | {pruned} |

Zeros take the same space on disk and the same time to multiply; only a 2:4 pattern can be faster,
and it needs a kernel for it. `pruning_recipe.json` says how to do it again, `pruning_report.json`
what is in each layer.
"""


def model_card(recipe: Mapping[str, Any], report: Mapping[str, Any]) -> ModelCard:
    """Return the card of a pruned model; it names no license, since the base model's applies.

    Args:
        recipe: `model`, `group` and `calibration` are read.
        report: `metric`, `pattern`, `sparsity` and the perplexities are read.
    """
    model, pattern = recipe["model"], report["pattern"]
    base = Path(model).resolve().name if Path(model).is_dir() else model  # no path goes public
    tags = ["prunevolve", "pruning", "sparse", pattern]
    data = ModelCardData(base_model=base, library_name="transformers", tags=tags)
    leaves = sorted(Metric.parse(report["metric"]).leaves)
    text = CARD.format(
        data=data.to_yaml(),
        base=base,
        pattern=pattern,
        sparsity=report["sparsity"],
        metric=report["metric"],
        leaves="\n".join(f"  - {name} is the {LEAVES[name].meaning}" for name in leaves),
        group=recipe["group"] or f"groups of the pattern {pattern}",
        calibration=_place(recipe["calibration"]) if recipe["calibration"] else "no text",
        place=f"{_place(report['perplexity_of'])}, {report['perplexity_of']['dtype']}",
        dense=_number(report["dense_perplexity"]),
        pruned=_number(report["pruned_perplexity"]),
    )
    return ModelCard(text)


def _place(provenance: Mapping[str, Any]) -> str:
    """Say where windows come from, without the path to a local file."""
    corpus = Path(provenance["corpus"]).name
    return f"{corpus}, split {provenance['split']}, {provenance['windows']} windows of " + (
        f"{provenance['length']} = {provenance['tokens']} tokens"
    )


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4g}"
