"""What is in a pruned model's files: zeros by layer, patterns, checksums; is it so still?

The zeros are counted in the files that were written, not in the model that was meant to be
written, one tensor in memory at a time.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from prunevolve.command_line import FolderError
from prunevolve.pruning.checkpoint import Checkpoint, is_finite, published_names
from prunevolve.pruning.json_file import JsonObject, read_object
from prunevolve.pruning.masks import Target, group_of, pattern_group
from prunevolve.pruning.models import load_config
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.ranking import count

RECIPE = "pruning_recipe.json"
REPORT = "pruning_report.json"


@dataclass(frozen=True)
class LayerCount:
    """What is in the saved weight of one layer."""

    name: str
    zeros: int
    size: int
    # Whether every group of an n:m pattern, every row (group `row`) or the matrix (group `layer`)
    # has the zeros that were asked for. Group `model` asks nothing of a single layer: True.
    pattern_ok: bool

    @staticmethod
    def of(name: str, weight: Tensor, target: Target) -> "LayerCount":
        """Count what is in a weight, on the CPU."""
        zero = _is_zero(weight)
        holds = weight.ndim == 2 and target.group.is_met(zero, target.sparsity)
        return LayerCount(name, count(zero), weight.numel(), holds)


@dataclass(eq=False)
class Inspector:
    """Looks into a pruned model's shards, each once: as they are written, or all at the end.

    Its methods raise ValueError for what is torn, missing, not finite or too dense.
    """

    config: PretrainedConfig
    names: Sequence[str]  # of the prunable layers, in order
    target: Target

    def __post_init__(self) -> None:
        self._layers = {
            published: name
            for name in self.names
            for published in published_names(self.config, f"{name}.weight")
        }
        self.sums: dict[str, str] = {}  # sha256 of the shards by name
        self._counts: dict[str, LayerCount] = {}

    def look(self, path: Path, expected: str | None = None) -> None:
        """Hash a shard, whose sha256 may be expected, and count the zeros of its layers."""
        with path.open("rb") as file:
            self.sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        if expected not in (None, self.sums[path.name]):
            raise FolderError(
                f"{str(path)!r} is not as it was written: remove it, and --resume makes it again"
            )
        shard = Checkpoint(path)
        for published in shard.entries:
            weight = shard.read(published)
            if not is_finite(weight):
                raise ValueError(f"tensor {published} has a value that is not finite")
            if name := self._layers.get(published):
                self._counts[name] = LayerCount.of(name, weight, self.target)

    def look_at_all(self, folder: Path, stage: str = "", on_progress: Progress = unwatched) -> None:
        """Look at the shards of a folder that were not looked at yet."""
        Checkpoint(folder)  # are all files there, and whole?
        left = [x for x in sorted(folder.glob("*.safetensors")) if x.name not in self.sums]
        with ThreadPoolExecutor(2) as pool:
            for done, _ in enumerate(pool.map(self.look, left), 1):
                on_progress(stage, done, len(left))
        if lost := [name for name in self.names if name not in self._counts]:
            raise ValueError(f"layer {lost[0]} has no weight")

    @property
    def layers(self) -> list[LayerCount]:
        """What is in the layers, in order; all shards must have been looked at."""
        return [self._counts[name] for name in self.names]

    def check_promise(self) -> None:
        """Refuse weights with fewer zeros than asked for: dense models get saved by mistake."""
        target, layers = self.target, self.layers
        promise = target.pattern_text
        if target.group_name:
            promise = f"{target.sparsity:g} per {target.group_name}"
        zeros, size = sum(layer.zeros for layer in layers), sum(layer.size for layer in layers)
        if not layers:
            raise ValueError("it has no pruned layer")
        if short := [layer.name for layer in layers if not layer.pattern_ok]:
            raise ValueError(f"layer {short[0]} is not {promise}")
        if target.group.whole_model and zeros < int(size * target.sparsity):
            raise ValueError(f"{zeros} zeros of {size} are not {promise}")


def _is_zero(weight: Tensor) -> Tensor:
    """Mark what is 0 or -0: the bits but the sign's are 0. numpy is five times as fast at it."""
    if not weight.is_floating_point() or weight.element_size() > 4:
        return weight == 0
    bits = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).numpy()
    return torch.from_numpy(np.asarray(np.left_shift(bits, 1) == 0))


def verify_result(folder: Path, on_progress: Progress = unwatched) -> JsonObject:
    """Compare a pruned model's files with its recipe and its report, and return the report.

    Raises FolderError for the first difference, or if the folder is no finished result.
    """
    for name in (RECIPE, REPORT):
        if not (folder / name).is_file():
            raise FolderError(f"{str(folder)!r} has no {name}: no finished pruned model")
    try:
        recipe, report = read_object(folder / RECIPE), read_object(folder / REPORT)
        name = recipe["group"]
        group = pattern_group(recipe["pattern"], name) or group_of(name)
        promised = [LayerCount(**layer) for layer in report["layers"]]
        names = [layer.name for layer in promised]
        target = Target(recipe["sparsity"], group)
        inspector = Inspector(load_config(str(folder)), names, target)
        inspector.look_at_all(folder, "verify", on_progress)
        for was, now in zip(promised, inspector.layers, strict=True):
            if was != now:
                raise ValueError(
                    f"layer {was.name} has {now.zeros} zeros of {now.size}, the report says "
                    f"{was.zeros} of {was.size}"
                )
        inspector.check_promise()
        if different := first_difference(recipe["sha256"], inspector.sums):
            raise ValueError(f"sha256 of {different}")
    except (OSError, SafetensorError, ValueError) as error:
        raise FolderError(f"{str(folder)!r} is not as it was saved: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"{str(folder)!r}: {RECIPE} or {REPORT} was altered ({type(error).__name__}: {error})"
        ) from error
    return report


def first_difference(before: JsonObject, now: JsonObject) -> str | None:
    """Say for the first key in which two mappings differ what both have; None if there is none."""
    for key in sorted({*before, *now}):
        was, there = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(there, dict) and was != there:
            return f"{key} {first_difference(was, there)}"
        if was != there:
            return f"{key} {was!r}, and it is {there!r}"
    return None
