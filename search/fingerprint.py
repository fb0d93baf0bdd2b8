"""Mask fingerprints: candidates that prune the same weights are found without an evaluation.

A candidate is scored on a probe, a few rows of a few layers, each probed layer taken as if it
were the whole matrix. Two formulas of one order give one mask there, whatever their text, and one
fingerprint. It runs in the driver and needs neither the model nor a worker.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.calibration import Statistics
from pruning.masks import Target, masker
from pruning.metric import Metric
from pruning.operators import LEAVES
from pruning.pruner import LayerScores

ROWS = 16
"""Rows taken of each probed layer, evenly spaced."""


@dataclass(frozen=True)
class Probe:
    """A few rows of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, in_features), fp32.
        statistics: Of the same rows, those that were collected.
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
        statistics: Of the same layers.
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


def fingerprint(metric: Metric, target: Target, probe: Probe) -> str:
    """Return a hash of a metric's mask on the probe, 16 hexadecimal digits.

    Raises:
        ValueError: If the metric is degenerate there: a probed layer's scores are not finite or
            constant, or every row of every layer has one and the same mask.
    """
    scores = LayerScores(metric, probe.weights, probe.statistics)
    mask_of = masker(target, scores)
    digest = hashlib.sha256()
    rows_differ = False
    for name in scores:
        mask = mask_of(scores[name])
        rows_differ |= bool((mask != mask[0]).any())
        digest.update(np.packbits(mask.numpy()).tobytes())
    if not rows_differ and (target.pattern or target.sparsity > 0):
        raise ValueError(f"'{metric.text}' prunes the same inputs in every row")
    return digest.hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' names and bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
