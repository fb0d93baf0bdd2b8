"""What is in a pruned model's files: zeros by layer, patterns, checksums; is it so still?

The zeros are counted in the files that were written, not in the model that was meant to be
written, one tensor in memory at a time.
"""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from pruning.checkpoint import Checkpoint
from pruning.masks import Target, group_of, parse_pattern
from pruning.metric_file import read_json
from pruning.models import load_config
from pruning.ranking import count
from pruning.result.work import REPORT, FolderMismatchError

RECIPE = "pruning_recipe.json"


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


def count_layers(
    folder: Path, config: PretrainedConfig, names: Sequence[str], target: Target
) -> list[LayerCount]:
    """Count the zeros of layers in a folder's safetensors files, two tensors in memory at a time.

    Raises:
        FolderMismatchError: If a file is torn or missing, a layer's weight is not there, or a
            tensor holds a value that is not finite.
    """
    try:
        checkpoint = Checkpoint(folder)
    except ValueError as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be read: {error}") from error
    layers = {checkpoint.find(config, f"{name}.weight"): name for name in names}
    if None in layers:
        raise FolderMismatchError(f"{str(folder)!r} has no weight of layer {layers[None]}")
    if missing := set(names) - set(layers.values()):
        raise FolderMismatchError(f"{str(folder)!r} has no weight of layer {min(missing)}")

    def look(published: str) -> LayerCount | None:
        weight = checkpoint.read([published])[published]
        if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            raise FolderMismatchError(
                f"{str(folder)!r}: tensor {published} has a value that is not finite"
            )
        if published not in layers:
            return None
        zero = _is_zero(weight)
        holds = weight.ndim == 2 and target.group.owes(zero, target.sparsity)
        return LayerCount(layers[published], count(zero), weight.numel(), holds)

    with ThreadPoolExecutor(2) as pool:
        counts = {one.name: one for one in pool.map(look, checkpoint.entries) if one}
    return [counts[name] for name in names]


def _is_zero(weight: Tensor) -> Tensor:
    """Mark what is 0 or -0: the bits but the sign's are 0. numpy is five times as fast at it."""
    if not weight.is_floating_point():
        return weight == 0
    bits = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).numpy()
    return torch.from_numpy(np.asarray(np.left_shift(bits, 1) == 0))


def checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of every safetensors file in a folder, by file name."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((path.name for path in paths), pool.map(digest, paths), strict=True))


def check_promise(folder: Path, layers: Sequence[LayerCount], target: Target) -> None:
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
    target = Target(
        report["sparsity"], parse_pattern(report["pattern"]) or group_of(recipe["group"])
    )
    promised = [LayerCount(**layer) for layer in report["layers"]]
    config = load_config(str(folder))
    found = count_layers(folder, config, [layer.name for layer in promised], target)
    for was, now in zip(promised, found, strict=True):
        if was != now:
            return (
                f"layer {was.name} has {now.zeros} zeros of {now.size}, the report says "
                f"{was.zeros} of {was.size}"
            )
    check_promise(folder, found, target)
    if problem := _untied(folder, config):
        return problem
    recorded, sums = recipe["sha256"], checksums(folder)
    for name in sorted({*recorded, *sums}):
        if recorded.get(name) != sums.get(name):
            own, told = sums.get(name, "none"), recorded.get(name, "none")
            return f"file {name} has sha256 {own:.16}, the recipe says {told:.16}"
    return None


def _untied(folder: Path, config: PretrainedConfig) -> str | None:
    """Describe embeddings and head that are tied and differ; one of them may be left out."""
    if not config.get_text_config().tie_word_embeddings:
        return None
    checkpoint = Checkpoint(folder)
    tied = ("embed_tokens.weight", "lm_head.weight")
    ends = [name for name in checkpoint.entries if name.endswith(tied)]
    tensors = list(checkpoint.read(ends).values())
    if len(tensors) == 2 and not torch.equal(*tensors):
        return f"{' and '.join(ends)} are tied by the config and differ"
    return None
