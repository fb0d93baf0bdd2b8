"""The model card of a pruned model, and what it and the command line say of a pruning."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData

from prunevolve.command_line import PRUNE
from prunevolve.evaluation import perplexity, zero_shot
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.checkpoint import Checkpoint
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.model_name import hub_id
from prunevolve.pruning.statistics import TERMINALS

CARD = """---
{header}
---

# {base}, pruned: {pattern}, {sparsity:.1%} {removed}

{what} The license of the base model applies.

- Score: `{metric}`{formula}, compared within: {group}
- Done: {way}
- Calibrated on: {calibration}

```
{measured}
```
{warnings}
{gain} `pruning_report.json` says what is in each layer, and `pruning_recipe.json` how to do it
again, where the same model and texts are:

```
{prune} --recipe pruning_recipe.json --out DIR
```
"""
_ZEROS = {
    "removed": "zeros",
    "what": "In every linear layer of the decoder blocks the weights with the lowest score are 0.",
    "gain": "Zeros take the same space on disk and the same time to multiply; only a 2:4 pattern\n"
    "can be faster, and it needs a kernel for it.",
}
_NARROWER = {
    "removed": "of each MLP",
    "what": "In every MLP the neurons with the lowest score, the sum of their weights', are gone.",
    "gain": "The model is that much smaller and faster, with any tool that reads its config.",
}
_GROUPS = {
    "row": "each row",
    "layer": "each layer",
    "model": "all layers, by one threshold, so that their sparsities differ",
}
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!])")  # what Markdown may take for more than text


def way_of(recipe: JsonObject) -> str:
    """Say of which inputs the statistics are, and how the kept weights are updated."""
    if recipe["metric"] == SPARSEGPT:
        return "masks and updates block by block, by inputs behind pruned blocks (SparseGPT)"
    sequential = recipe["propagation"] == "sequential"
    source = "inputs behind pruned blocks" if sequential else "the dense model"
    updates = {"sparsegpt": ", updated block by block", "reconstruct": ", trained by block"}
    update, part = updates.get(recipe["update"], ""), recipe.get("update_part", 1)
    if part == 0:
        update = ", no update, as it raised the loss of held-back windows"
    elif part < 1:
        update += f", {part:.0%} of the way, as windows held back chose"
    skipped = recipe.get("skip")
    return f"statistics of {source}{update}" + (f"; `{skipped}` left dense" if skipped else "")


def model_card(recipe: JsonObject, report: JsonObject) -> str:
    """Return the card of a pruned model; it names no license, since the base model's applies."""
    model, formula = recipe["model"], ""
    name = Path(model).resolve().name if Path(model).is_dir() else model  # no path
    if "tree" in recipe:
        metric = Metric.parse(report["metric"])
        named = [f"{name} is the {TERMINALS[name].meaning}" for name in sorted(metric.terminals)]
        formula = f", that is {metric.infix}, where {', '.join(named)}"
    calibration, on_hub = recipe["calibration"], hub_id(model)
    base = on_hub[0] if on_hub else None
    tags = ["prunevolve", "pruning", "sparse"]
    header = ModelCardData(base_model=base, library_name="transformers", tags=tags)
    values = {
        "header": header.to_yaml(),
        "prune": PRUNE,
        "base": _MARKUP.sub(r"\\\1", name),
        "formula": formula,
        "group": _GROUPS.get(recipe["group"], "groups of the pattern"),
        "way": way_of(recipe),
        "calibration": perplexity.source_of(calibration) if calibration else "no text",
        "measured": "\n".join(measured_lines(report)),
        "warnings": "".join(f"\nWarning: {line}.\n" for line in report["warnings"]),
    }
    return CARD.format_map(recipe | (_NARROWER if "size" in report else _ZEROS) | values)


def measured_lines(measured: JsonObject) -> list[str]:
    """Return what a report says of perplexity, zero-shot tasks and size as text."""
    lines = perplexity.lines(measured) + zero_shot.lines(measured)
    for kind, size in measured.get("size", {}).items():
        less = 1 - size["pruned"] / size["dense"]
        lines.append(f"{kind} {size['dense']:,} to {size['pruned']:,}, {less:.1%} less")
    return lines


def sizes(dense: Checkpoint, pruned: Checkpoint) -> JsonObject:
    """Return what a report says of parameters and bytes of the weights if they are fewer."""
    parameters, weights = {}, {}
    for name, checkpoint in (("dense", dense), ("pruned", pruned)):
        counts = [(x.numel(), x.nbytes) for x in map(checkpoint.read, checkpoint.entries)]
        parameters[name], weights[name] = map(sum, zip(*counts, strict=True))
    is_same = weights["dense"] == weights["pruned"]
    return {} if is_same else {"size": {"parameters": parameters, "bytes of weights": weights}}
