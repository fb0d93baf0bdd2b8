"""A pruned model's folder: shards, tokenizer, recipe, model card and report.

The report comes last: a folder with a report is a finished one.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from pruning.model_name import with_revision
from pruning.models import source_of
from pruning.output.card import model_card
from pruning.output.folder import REPORT, FolderMismatchError, write_json
from pruning.output.verify import RECIPE, Inspector, LayerCount, check_promise
from pruning.progress import Progress, unwatched
from pruning.store import FolderStore

CROWDED = 0.9
"""Fraction of zeros above which a layer is warned about: little is left of it."""


def save_result(
    store: FolderStore,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Mapping[str, Any],
    measured: Mapping[str, Any],
    inspector: Inspector,
    on_progress: Progress = unwatched,
) -> dict[str, Any]:
    """Write all that makes a folder of shards a pruned model, the report last.

    Args:
        store: Has written a shard for every block into its folder.
        recipe: All that is needed to do it again; versions and checksums are added.
        measured: What the report says of perplexity, and the warnings before those about layers.
        inspector: Has looked at some of the shards, and looks at the others.
        on_progress: Told how many of the files that were not looked at yet have been read back.

    Returns:
        The report, as written.

    Raises:
        FolderMismatchError: If the folder cannot be written, or what is read back from it does
            not hold what the target asks.
    """
    folder = store.shard(None).parent
    try:
        store.write_outside()
        index = {"metadata": {"total_size": store.checkpoint.size}, "weight_map": store.placed()}
        write_json(folder / "model.safetensors.index.json", index)
        _save_configs(store.config, with_revision(recipe["model"], recipe.get("revision")), folder)
        tokenizer.save_pretrained(folder)
        layers, sums = inspector.look_at_all(folder, "save", on_progress)
        check_promise(folder, layers, inspector.target)
        report = _report(recipe, measured, layers)
        papers = {**recipe, "versions": _versions(), "sha256": sums}
        write_json(folder / RECIPE, papers)
        model_card(papers, report).save(folder / "README.md")
        write_json(folder / REPORT, report)
    except SafetensorError as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be written: {error}") from error
    return report


def _save_configs(config: PretrainedConfig, model: str, folder: Path) -> None:
    config.save_pretrained(folder)
    source, revision = source_of(model)
    try:
        GenerationConfig.from_pretrained(source, revision=revision).save_pretrained(folder)
    except (OSError, ValueError):
        return  # the model has none, or one that transformers refuses to write


def _report(
    recipe: Mapping[str, Any], measured: Mapping[str, Any], layers: Sequence[LayerCount]
) -> dict[str, Any]:
    report = {key: recipe[key] for key in ("metric", "pattern", "sparsity")} | _finite(measured)
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


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures with None for one that is not finite, since JSON has no infinity."""
    finite = dict(numbers)
    for key, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            finite[key] = None
        elif key == "by_text":
            finite[key] = [_finite(text) for text in value]
    return finite


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
