"""A pruned model's folder: shards, tokenizer, recipe, model card and report.

The card says what was removed, by which score, and what it cost. The report comes last: a folder
with a report is a finished one.
"""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prunevolve.evaluation import zero_shot
from prunevolve.pruning.json_file import JsonObject, write_json
from prunevolve.pruning.masks import CROWDED
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.output.folder import REPORT, FolderMismatchError
from prunevolve.pruning.output.verify import RECIPE, Inspector, LayerCount, check_promise
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.statistics import LEAVES
from prunevolve.pruning.store import FolderStore

CARD = """# {base}, pruned: {pattern}, {sparsity:.1%} zeros

In every linear layer of the decoder blocks the weights with the lowest score are zero; {others}.
The license of the base model applies.

- Score: `{metric}`{leaves}
- Weights compete within: {group}
- Allocation over layers, refinement of masks: {allocation}, {refine}
- Calibrated on: {calibration}

| model | perplexity ({place}) |
|---|---|
| dense | {dense} |
| pruned | {pruned} |
{zero_shot}{warnings}
Zeros take the same space on disk and the same time to multiply; only a 2:4 pattern can be faster,
and it needs a kernel for it. `pruning_report.json` says what is in each layer, and
`pruning_recipe.json` how to do it again, where the same model and texts are:

```
python run_prune.py --recipe pruning_recipe.json --out DIR
```
"""


_OTHERS = {
    "none": "all other weights are those of the base model",
    "sparsegpt": "the others were changed to make up for it (SparseGPT, arXiv:2301.00774)",
    "reconstruct": "the others were trained, block by block, to give the base model's outputs",
}
"""What has become of the weights that stay, by update."""


def save_result(
    store: FolderStore,
    tokenizer: PreTrainedTokenizerBase,
    recipe: JsonObject,
    measured: JsonObject,
    inspector: Inspector,
    on_progress: Progress = unwatched,
    measure_saved: Callable[[Path], JsonObject] = lambda folder: {},
) -> JsonObject:
    """Write all that makes a folder of shards a pruned model, the report last.

    Args:
        store: Has written a shard for every block into its folder.
        recipe: All that is needed to do it again; versions and checksums are added.
        measured: What the report says of perplexity, and the warnings before those about layers.
        inspector: Has looked at some of the shards, and looks at the others.
        on_progress: Told how many of the files that were not looked at yet have been read back.
        measure_saved: Called with the folder when the model can be loaded from it; returns what the
            report says besides.

    Returns:
        The report, as written.

    Raises:
        FolderMismatchError: If the folder cannot be written, or what is read back from it does
            not hold what the target asks.
    """
    folder = store.shard(None).parent
    try:
        store.write_outside()
        _save_configs(store, folder)
        tokenizer.save_pretrained(folder)
        layers, sums = inspector.look_at_all(folder, "save", on_progress)
        check_promise(folder, layers, inspector.target)
        report = _report(recipe, measured | measure_saved(folder), layers)
        write_json(folder / RECIPE, {**recipe, "versions": _versions(), "sha256": sums})
        (folder / "README.md").write_text(model_card(recipe, report), encoding="utf-8")
        write_json(folder / REPORT, report)
    except SafetensorError as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be written: {error}") from error
    return report


def _save_configs(store: FolderStore, folder: Path) -> None:
    store.config.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(store.checkpoint.place).save_pretrained(folder)
    except (OSError, ValueError):
        return  # the model has none, or one that transformers refuses to write


def _report(recipe: JsonObject, measured: JsonObject, layers: Sequence[LayerCount]) -> JsonObject:
    report = {key: recipe[key] for key in ("metric", "pattern", "sparsity")} | finite(measured)
    warnings = [*report.pop("warnings"), *_crowded(layers)]
    return report | {"layers": [asdict(layer) for layer in layers], "warnings": warnings}


def _crowded(layers: Sequence[LayerCount]) -> list[str]:
    """Return one warning about all layers of which little is left, or none."""
    crowded = [layer for layer in layers if layer.zeros > CROWDED * layer.size]
    if not crowded:
        return []
    worst = max(crowded, key=lambda layer: layer.zeros / layer.size)
    told = f"layer {worst.name} is {worst.zeros / worst.size:.1%} zeros"
    others = len(crowded) - 1
    return [
        told if not others else f"{told}, and {others} of {len(layers)} are above {CROWDED:.0%}"
    ]


def finite(numbers: JsonObject) -> JsonObject:
    """Return figures with None for one that is not finite, since JSON has no infinity."""
    result = dict(numbers)
    for key, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            result[key] = None
        elif key == "by_text":
            result[key] = [finite(text) for text in value]
    return result


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def model_card(recipe: JsonObject, report: JsonObject) -> str:
    """Return the card of a pruned model; it names no license, since the base model's applies.

    Args:
        recipe: `model`, `group`, `calibration` and the methods are read.
        report: `metric`, `pattern`, `sparsity` and the perplexities are read.
    """
    model, pattern = recipe["model"], report["pattern"]
    leaves = sorted(Metric.parse(report["metric"]).leaves) if "tree" in recipe else []
    named = "".join(f"\n  - {name} is the {LEAVES[name].meaning}" for name in leaves)
    return CARD.format(
        base=Path(model).resolve().name if Path(model).is_dir() else model,  # no path goes public
        pattern=pattern,
        sparsity=report["sparsity"],
        metric=report["metric"],
        leaves=f", that is {Metric.parse(report['metric']).infix}, where{named}" if leaves else "",
        others=_others(recipe),
        allocation=recipe["allocation"],
        refine=recipe["refine"],
        group=recipe["group"] or f"groups of the pattern {pattern}",
        calibration=_place(recipe["calibration"]) if recipe["calibration"] else "no text",
        place=f"{_place(report['perplexity_of'])}, {report['perplexity_of']['dtype']}",
        dense=_number(report["dense_perplexity"]),
        pruned=_number(report["pruned_perplexity"]),
        warnings="".join(f"\nWarning: {line}.\n" for line in report["warnings"]),
        zero_shot="".join(f"\n{line}" for line in [*zero_shot.lines(report), ""]),
    )


def _others(recipe: JsonObject) -> str:
    """Say what has become of the weights that stay."""
    if "tree" in recipe:
        return _OTHERS[recipe["update"]]
    more = [_OTHERS[recipe["update"]]] if recipe["update"] == "reconstruct" else []
    return "; then ".join([_OTHERS["sparsegpt"], *more])


def _place(provenance: JsonObject) -> str:
    """Say where windows come from, without the path to a local file."""
    corpus = Path(provenance["corpus"]).name
    return f"{corpus}, split {provenance['split']}, {provenance['windows']} windows of " + (
        f"{provenance['length']} = {provenance['tokens']} tokens"
    )


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4g}"
