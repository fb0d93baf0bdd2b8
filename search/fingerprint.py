"""Mask fingerprints: find candidates that prune the same weights without evaluating them.

A candidate is scored on a probe, a few rows of a few layers, each treated as if it were the whole
matrix. Formulas that rank the weights alike give the same mask there, whatever their text, and so
the same fingerprint. This runs in the driver and needs neither the model nor a worker.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pruning.criterion import Criterion
from pruning.leaves import LEAVES, Statistics
from pruning.masks import DegenerateScores, Target, select
from pruning.recipe import LayerScores

Bits = npt.NDArray[np.uint8]
"""Masks packed into bytes."""

ROWS = 16
"""Rows taken of each probed layer, evenly spaced."""

SKETCH_BYTES = 2048
"""Bytes of a task's mask that a sketch takes, at most."""

KEPT_MASKS = 1024
"""Number of masks kept in memory, tens of kilobytes each."""


@dataclass(frozen=True)
class Probe:
    """A few rows of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, in_features), fp32.
        statistics: The collected statistics of the same rows.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by `W/layer`, `G/layer` and so on, as they are stored."""
        weights = {f"W/{name}": weight for name, weight in self.weights.items()}
        return weights | self.statistics.to_tensors()

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Probe":
        """Rebuild a probe from `to_tensors`, layers in the order of their names."""
        weights = {key[2:]: tensors[key] for key in sorted(tensors) if key.startswith("W/")}
        others = {key: tensors[key] for key in sorted(tensors) if not key.startswith("W/")}
        return Probe(weights, Statistics.from_tensors(others))


def take_probe(
    weights: Mapping[str, Tensor], statistics: Statistics, blocks: Mapping[str, object]
) -> Probe:
    """Take the probe: rows of every linear layer of an early, a middle and a late block.

    Args:
        weights: Dense weights by layer name.
        statistics: The statistics of the same layers.
        blocks: The decoder blocks by name, in order.
    """
    names = list(blocks)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    layers = [name for name in weights if any(name.startswith(f"{block}.") for block in chosen)]

    def rows_of(matrix: Tensor) -> Tensor:
        step = max(1, matrix.shape[0] // ROWS)
        return matrix[::step][:ROWS].detach().float().cpu().clone()

    parts: dict[str, Tensor] = {f"W/{layer}": rows_of(weights[layer]) for layer in layers}
    for layer in layers:
        for leaf, statistic in statistics.of(layer).items():
            per_row = LEAVES[leaf].shape.by_row
            parts[f"{leaf}/{layer}"] = rows_of(statistic) if per_row else statistic.cpu().clone()
    return Probe.from_tensors(parts)


class Fingerprints:
    """Fingerprints for one or more tasks; recent masks are kept for computing distances.

    Args:
        tasks: Each task's probe of its model, and the target that a comparison group gives it.
    """

    def __init__(self, tasks: Sequence[tuple[Probe, Callable[[str], Target]]]) -> None:
        self.tasks = tasks
        self._mask = lru_cache(KEPT_MASKS)(self._probe_mask)

    def fingerprint(self, criterion: Criterion) -> str:
        """Return a hash of a criterion's masks on the probes, 16 hexadecimal digits.

        Raises:
            DegenerateScores: If a probed layer's scores are not finite or are constant, or if in
                every layer all rows have the same mask.
        """
        mask = b"".join(part.tobytes() for part in self._mask(criterion))
        # Includes the group: two groups may agree on a few rows but not on whole layers.
        return hashlib.sha256(criterion.group.encode() + mask).hexdigest()[:16]

    def distance(self, one: Criterion, other: Criterion) -> float:
        """Return the fraction of probed weights that one criterion removes and the other keeps.

        0 means equal masks; two unrelated masks at 50% sparsity differ in 0.5.
        """
        pairs = zip(self._mask(one), self._mask(other), strict=True)
        differing = sum(int(np.bitwise_count(a ^ b).sum()) for a, b in pairs)
        return differing / self._probed

    def sketch(self, criterion: Criterion) -> tuple[Bits, ...]:
        """Return for each task an even sample of the bytes of its mask, to compare masks by."""
        masks = self._mask(criterion)
        return tuple(mask[:: 1 + mask.size // SKETCH_BYTES] for mask in masks)

    def diversity(self, members: Sequence[Criterion], least: float) -> dict[str, float]:
        """Count members and masks at least `least` apart, and average the pairwise distances."""
        masks: list[Criterion] = []
        for member in members:
            if all(self.distance(member, other) >= least for other in masks):
                masks.append(member)
        distances = [self.distance(*pair) for pair in combinations(members, 2)]
        mean = sum(distances) / len(distances) if distances else 0.0
        return {"members": len(members), "masks": len(masks), "mean_distance": mean}

    @cached_property
    def _probed(self) -> int:
        return sum(w.numel() for probe, _ in self.tasks for w in probe.weights.values())

    def _probe_mask(self, criterion: Criterion) -> tuple[Bits, ...]:
        scores: dict[int, Mapping[str, Tensor]] = {}
        parts = []
        for probe, target_of in self.tasks:
            if id(probe) not in scores:
                lazy = LayerScores(criterion.metric, probe.weights, probe.statistics.of)
                scores[id(probe)] = dict(lazy)
            target = target_of(criterion.group)
            parts.append(probe_mask(scores[id(probe)], target, criterion.text))
        return tuple(parts)


def probe_mask(scores: Mapping[str, Tensor], target: Target, metric: str) -> Bits:
    """Return the masks of probed layers as bits, packed into bytes.

    Raises:
        DegenerateScores: If in every layer all rows have the same mask.
    """
    packed = []
    rows_differ = False
    for joined, layers in _joined(scores, target):
        ((_, selected),) = select({"": joined}, target)
        mask = selected.numpy()
        packed.append(np.packbits(mask))
        start = 0
        for layer in layers:
            layer_mask = mask.reshape(-1)[start : start + layer.numel()].reshape(layer.shape)
            start += layer.numel()
            rows_differ = rows_differ or bool((layer_mask != layer_mask[0]).any())
    if not rows_differ and (target.group.implied_sparsity or target.sparsity):
        raise DegenerateScores(f"'{metric}' prunes the same inputs in every row")
    return np.concatenate(packed)


def _joined(scores: Mapping[str, Tensor], target: Target) -> list[tuple[Tensor, list[Tensor]]]:
    """Return matrices to select from, each with the layers that it consists of.

    On so few rows the overhead of each call dominates, so layers are joined where the group allows.
    """
    if target.group.whole_model:
        layers = list(scores.values())
        return [(torch.cat([layer.flatten() for layer in layers])[None], layers)]
    if not target.group.within_rows:
        return [(layer, [layer]) for layer in scores.values()]
    by_width: dict[int, list[Tensor]] = {}
    for layer in scores.values():
        by_width.setdefault(layer.shape[1], []).append(layer)
    return [(torch.cat(layers), layers) for layers in by_width.values()]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' names and bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
