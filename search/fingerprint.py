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
from pruning.pruner import LayerScores

ROWS = 16
"""Rows taken of each probed layer, evenly spaced."""


@dataclass(frozen=True)
class Probe:
    """A few rows of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, in_features), fp32.
        statistics: G, (rows, in_features), and X, (1, in_features), of the same rows.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by `W/layer`, `G/layer` and `X/layer`, as they are stored."""
        parts = {"W": self.weights, "G": self.statistics.G, "X": self.statistics.X}
        return {f"{leaf}/{name}": t for leaf, part in parts.items() for name, t in part.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Probe":
        """Rebuild a probe from `to_tensors`, layers in the order of their names."""
        parts: dict[str, dict[str, Tensor]] = {"W": {}, "G": {}, "X": {}}
        for key in sorted(tensors):
            leaf, name = key.split("/", 1)
            parts[leaf][name] = tensors[key]
        return Probe(parts["W"], Statistics(parts["X"], parts["G"]))


def take_probe(
    weights: Mapping[str, Tensor], statistics: Statistics, blocks: Mapping[str, object]
) -> Probe:
    """Take the probe: rows of every linear layer of an early, a middle and a late block.

    Args:
        weights: Dense weights by layer name.
        statistics: X and G of the same layers.
        blocks: The decoder blocks by name, in order.
    """
    names = list(blocks)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    layers = [name for name in weights if any(name.startswith(f"{block}.") for block in chosen)]

    def rows_of(matrix: Tensor) -> Tensor:
        step = max(1, matrix.shape[0] // ROWS)
        return matrix[::step][:ROWS].detach().float().cpu().clone()

    probe = Probe(
        {name: rows_of(weights[name]) for name in layers},
        Statistics(
            {name: statistics.X[name].cpu().clone() for name in layers},
            {name: rows_of(statistics.G[name]) for name in layers},
        ),
    )
    return Probe.from_tensors(probe.to_tensors())


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
