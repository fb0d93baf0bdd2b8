"""The README.md of a pruned model: what was removed, by which score, and what it cost."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from evaluation.sources import HUB_CORPORA
from pruning.leaves import LEAVES
from pruning.metric import Metric
from pruning.model_name import comes_from_hub

CARD = """---
{data}
---

# {title}

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
and it needs a kernel for it. `pruning_report.json` says what is in each layer, and
`pruning_recipe.json` how to do it again, where the same model and texts are:

```
python run_prune.py --recipe pruning_recipe.json --out DIR
```
"""


def model_card(recipe: Mapping[str, Any], report: Mapping[str, Any]) -> ModelCard:
    """Return the card of a pruned model; it names no license, since the base model's applies.

    Args:
        recipe: `model`, `group` and `calibration` are read.
        report: `metric`, `pattern`, `sparsity` and the perplexities are read.
    """
    model, pattern = recipe["model"], report["pattern"]
    base = Path(model).resolve().name if Path(model).is_dir() else model  # no path goes public
    title = f"{base}, pruned: {pattern}, {report['sparsity']:.1%} zeros"
    leaves = sorted(Metric.parse(report["metric"]).leaves)
    text = CARD.format(
        data=_metadata(title, recipe, report).to_yaml(),
        title=title,
        metric=report["metric"],
        leaves="\n".join(f"  - {name} is the {LEAVES[name].meaning}" for name in leaves),
        group=recipe["group"] or f"groups of the pattern {pattern}",
        calibration=_place(recipe["calibration"]) if recipe["calibration"] else "no text",
        place=f"{_place(report['perplexity_of'])}, {report['perplexity_of']['dtype']}",
        dense=_number(report["dense_perplexity"]),
        pruned=_number(report["pruned_perplexity"]),
    )
    return ModelCard(text)


def _metadata(title: str, recipe: Mapping[str, Any], report: Mapping[str, Any]) -> ModelCardData:
    """Return what the hub reads: a base model and data sets only where it has them."""
    results = _results(report)
    corpora = (recipe["calibration"] or {}).get("corpus", "").split(" + ")
    of_hub = dict.fromkeys(HUB_CORPORA[name].path for name in corpora if name in HUB_CORPORA)
    # Of the hub's four relations (quantized, adapter, merge, finetune) the one in which weights of
    # the same number format have changed.
    base = {}
    if comes_from_hub(recipe["model"]):
        base = {"base_model": recipe["model"], "base_model_relation": "finetune"}
    return ModelCardData(
        **base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["prunevolve", "pruning", "sparse", report["pattern"]],
        datasets=list(of_hub) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _results(report: Mapping[str, Any]) -> list[EvalResult]:
    """Return the pruned perplexity on each text, where it is finite."""
    windows = "{windows} windows of {length} tokens".format(**report["perplexity_of"])
    results = []
    for text in report["by_text"]:
        corpus = Path(text["corpus"]).name  # of a local file
        on_hub = HUB_CORPORA.get(corpus)
        split, _, slice_ = text["split"].partition("[")
        if text["pruned"] is not None:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=re.sub(r"[^\w./-]", "-", on_hub.path if on_hub else corpus),
                    dataset_name=f"{corpus} [{slice_}" if slice_ else corpus,
                    dataset_config=on_hub.name if on_hub else None,
                    dataset_split=split or None,
                    metric_type="perplexity",
                    metric_name=f"perplexity, {windows} in all",
                    metric_value=text["pruned"],
                )
            )
    return results


def _place(provenance: Mapping[str, Any]) -> str:
    """Say where windows come from, without the path to a local file."""
    corpus = Path(provenance["corpus"]).name
    return f"{corpus}, split {provenance['split']}, {provenance['windows']} windows of " + (
        f"{provenance['length']} = {provenance['tokens']} tokens"
    )


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4g}"
