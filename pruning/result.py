"""A pruned model's folder: shards, tokenizer, recipe, model card and report; and its check.

The zeros are counted in the files that were written, not in the model that was meant to be
written, and the report comes last: a folder with a report is a finished one.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.masks import Target, group_of, parse_pattern
from pruning.metric_file import SCHEMA, read_json
from pruning.model_card import model_card
from pruning.models import linear_layers

RECIPE = "pruning_recipe.json"
REPORT = "pruning_report.json"

SHARD_SIZE = "4GB"
"""Longest file of weights."""

CROWDED = 0.9
"""Fraction of zeros above which a layer is warned about: little is left of it."""


class FolderMismatchError(ValueError):
    """A folder does not fit what is asked of it."""


@dataclass(frozen=True)
class LayerCount:
    """What is in the saved weight of one layer.

    Attributes:
        name: Qualified name of the layer in the model.
        zeros: Number of zero weights.
        size: Number of weights.
        pattern_ok: Whether every group of an n:m pattern, every row (group `row`) or the matrix
            (group `layer`) has the zeros that were asked for. Group `model` asks nothing of a
            single layer: True.
    """

    name: str
    zeros: int
    size: int
    pattern_ok: bool


@dataclass(frozen=True)
class Perplexities:
    """Perplexity before and after pruning, and where it was measured (JSON-able provenance)."""

    dense: float
    pruned: float
    provenance: Mapping[str, Any]


def check_output_folder(folder: Path, size: int) -> None:
    """Check that a new model can be written into a folder, without creating it.

    Args:
        folder: An empty folder, or one that is not there yet.
        size: Bytes of weights that will be written.

    Raises:
        FolderMismatchError: If it is a file, holds something, cannot be written, or the disk has
            less room.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise FolderMismatchError(f"out {str(folder)!r}: {parent} is a file; name a new folder")
    if not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        raise FolderMismatchError(
            f"out {str(folder)!r}: no right to write in {parent}; name another folder"
        )
    if parent == folder and any(folder.iterdir()):
        raise FolderMismatchError(f"out {str(folder)!r} is not empty: name a new folder")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise FolderMismatchError(
            f"out {str(folder)!r} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB "
            "left: name a folder on another disk"
        )


def save_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: Mapping[str, Any],
    target: Target,
    perplexities: Perplexities,
    warnings: Sequence[str] = (),
    shard_size: str = SHARD_SIZE,
) -> dict[str, Any]:
    """Write a pruned model and its papers into a folder, the report last.

    Args:
        recipe: All that is needed to do it again; schema, versions and checksums are added. Its
            `model`, `metric`, `group` and `calibration` are read for the card.
        warnings: Lines for the report, before those about the layers.

    Returns:
        The report, as written.

    Raises:
        FolderMismatchError: If the folder cannot be written, or what is read back from it does
            not hold what `target` asks.
    """
    names = list(linear_layers(model))
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
        layers = count_layers(folder, names, target)
        _check_promise(folder, layers, target)
        lines = [*warnings, *_layer_warnings(layers)]
        report = _report(recipe["metric"], target, perplexities, layers, lines)
        papers = {"schema": SCHEMA, **recipe, "versions": _versions(), "sha256": checksums(folder)}
        _write_json(folder / RECIPE, papers)
        model_card(papers, report).save(folder / "README.md")
        _write_json(folder / REPORT, report)
    except (OSError, SafetensorError) as error:
        raise FolderMismatchError(f"out {str(folder)!r} cannot be written: {error}") from error
    return report


def verify_result(folder: Path) -> dict[str, Any]:
    """Compare a pruned model's files with its recipe and its report, and return the report.

    Raises:
        FolderMismatchError: If the folder is no finished result, or differs from its papers; the
            message names the first difference.
    """
    for name in (RECIPE, REPORT):
        if not (folder / name).is_file():
            raise FolderMismatchError(f"{str(folder)!r} has no {name}: no finished pruned model")
    try:
        recipe, report = read_json(folder / RECIPE), read_json(folder / REPORT)
        problem = _first_difference(folder, recipe, report)
    except (OSError, SafetensorError) as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be read: {error}") from error
    except FolderMismatchError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderMismatchError(
            f"{str(folder)!r}: {RECIPE} or {REPORT} was altered ({type(error).__name__}: {error})"
        ) from error
    if problem:
        raise FolderMismatchError(f"{str(folder)!r} is not as it was saved: {problem}")
    return report


def count_layers(folder: Path, names: Sequence[str], target: Target) -> list[LayerCount]:
    """Count the zeros of layers in a folder's safetensors files, one tensor in memory at a time.

    Raises:
        FolderMismatchError: If a layer's weight is not there.
    """
    # transformers saves some families (gemma3) under their published names, which have the same
    # parts in another order: `language_model.model.layers` for `model.language_model.layers`.
    places: dict[tuple[str, ...], tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places |= {tuple(sorted(key.split("."))): (path, key) for key in file.keys()}  # noqa: SIM118
    counts = []
    for name in names:
        place = places.get(tuple(sorted(f"{name}.weight".split("."))))
        if place is None:
            raise FolderMismatchError(f"{str(folder)!r} has no weight of layer {name}")
        with safe_open(place[0], "pt") as file:
            weight = file.get_tensor(place[1])
        zero = weight == 0
        holds = weight.ndim == 2 and target.group.owes(zero, target.sparsity)
        counts.append(LayerCount(name, int(zero.sum()), weight.numel(), holds))
    return counts


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every safetensors file in a folder, by file name."""
    sums = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _report(
    metric: str,
    target: Target,
    perplexities: Perplexities,
    layers: Sequence[LayerCount],
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "metric": metric,
        "pattern": target.pattern_text,
        "sparsity": target.sparsity,
        "dense_perplexity": _finite(perplexities.dense),
        "pruned_perplexity": _finite(perplexities.pruned),
        "perplexity_of": dict(perplexities.provenance),
        "layers": [asdict(layer) for layer in layers],
        "warnings": list(warnings),
    }


def _check_promise(folder: Path, layers: Sequence[LayerCount], target: Target) -> None:
    """Refuse saved weights with fewer zeros than asked for: dense models get saved by mistake."""
    if not layers:
        raise FolderMismatchError(f"{str(folder)!r} has no pruned layer")
    name = target.group_name
    asked = f"{target.sparsity:g} per {name}" if name else target.pattern_text
    for layer in layers:
        if not layer.pattern_ok:
            raise FolderMismatchError(f"{str(folder)!r}: layer {layer.name} is not {asked}")
    zeros, size = (sum(getattr(layer, key) for layer in layers) for key in ("zeros", "size"))
    if target.group.whole_model and zeros < int(size * target.sparsity):
        raise FolderMismatchError(f"{str(folder)!r}: {zeros} zeros of {size} are not {asked}")


def _first_difference(
    folder: Path, recipe: Mapping[str, Any], report: Mapping[str, Any]
) -> str | None:
    """Describe the first difference between a folder's weights, its recipe and its report."""
    for key in ("metric", "pattern", "sparsity"):
        if recipe[key] != report[key]:
            return f"{key} is {recipe[key]!r} in the recipe, {report[key]!r} in the report"
    group = parse_pattern(report["pattern"]) or group_of(recipe["group"])
    target = Target(report["sparsity"], group)
    promised = [LayerCount(**layer) for layer in report["layers"]]
    found = count_layers(folder, [layer.name for layer in promised], target)
    for was, now in zip(promised, found, strict=True):
        if was != now:
            return (
                f"layer {was.name} has {now.zeros} zeros of {now.size}, the report says "
                f"{was.zeros} of {was.size}"
            )
    _check_promise(folder, found, target)
    recorded, sums = recipe["sha256"], checksums(folder)
    for name in sorted({*recorded, *sums}):
        if recorded.get(name) != sums.get(name):
            own, told = sums.get(name, "none"), recorded.get(name, "none")
            return f"file {name} has sha256 {own:.16}, the recipe says {told:.16}"
    return None


def _layer_warnings(layers: Sequence[LayerCount]) -> list[str]:
    return [
        f"layer {layer.name} is {layer.zeros / layer.size:.1%} zeros"
        for layer in layers
        if layer.zeros > CROWDED * layer.size
    ]


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write by renaming, so that a file under its final name is a whole one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
