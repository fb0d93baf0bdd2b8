"""The probe: a few rows of a few layers, on which criteria are compared without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.leaves import LEAVES, Statistics
from pruning.masks import DegenerateScores, Target, select
from pruning.metric import Metric
from pruning.ranking import lowest_per_row
from pruning.recipe import check_extremes

ROWS = 16
"""Rows taken of each probed layer, evenly spaced."""


@dataclass(frozen=True)
class Probe:
    """A few rows of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, in_features), fp32.
        statistics: The collected statistics of the same rows.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights.values())

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


@dataclass(frozen=True)
class Stack:
    """Probed layers of one shape, scored in one call: on so few rows each call's overhead counts.

    Attributes:
        layers: Their names.
        leaves: Absolute weights and statistics by leaf, (layers, rows or 1, in_features or 1).
    """

    layers: list[str]
    leaves: dict[str, Tensor]

    def score(self, metric: Metric) -> Tensor:
        """Return the scores, (layers, rows, in_features), fp32; they may be non-finite."""
        return metric.score(**self.leaves).expand_as(self.leaves["W"])

    def check(self, metric: Metric, scores: Tensor) -> None:
        """Raise DegenerateScores if a layer's scores are not finite or are constant."""
        lowest, highest = scores.amin((1, 2)).tolist(), scores.amax((1, 2)).tolist()
        for layer, low, high in zip(self.layers, lowest, highest, strict=True):
            check_extremes(metric, layer, low, high)


def stack_layers(probe: Probe, step: int = 1, block: int = 1) -> list[Stack]:
    """Stack the layers of each shape.

    Args:
        step: Of so many blocks of inputs the first is taken, in each layer.
        block: Inputs in a block.
    """
    by_shape: dict[torch.Size, list[str]] = {}
    for layer, weight in probe.weights.items():
        by_shape.setdefault(weight.shape, []).append(layer)
    stacks = []
    for shape, layers in by_shape.items():
        taken = torch.arange(shape[1]) // block % step == 0
        leaves: dict[str, list[Tensor]] = {}
        for layer in layers:
            values = {"W": probe.weights[layer].abs(), **probe.statistics.of(layer)}
            for leaf, value in values.items():
                by_column = LEAVES[leaf].shape.by_column
                leaves.setdefault(leaf, []).append(value[:, taken] if by_column else value)
        stacks.append(Stack(layers, {leaf: torch.stack(every) for leaf, every in leaves.items()}))
    return stacks


def probe_masks(scores: Sequence[Tensor], target: Target) -> list[Tensor]:
    """Return the masks of stacks of layers, (layers, rows, in_features) each as its scores are."""
    if target.group.whole_model or target.group.within_rows:
        # Where its rows are from does not matter, so that a stack is as good as a layer.
        stacks = {str(i): stack.flatten(0, 1) for i, stack in enumerate(scores)}
        masks = [mask for _, mask in select(stacks.__getitem__, stacks, target)]
    else:
        masks = [lowest_per_row(stack.flatten(1), target.sparsity) for stack in scores]
    return [mask.view(stack.shape) for mask, stack in zip(masks, scores, strict=True)]


def check_rows_differ(masks: Sequence[Tensor], target: Target, metric: str) -> None:
    """Check that some layer's rows do not all have the same mask.

    Raises:
        DegenerateScores: If in every layer all rows have the same mask.
    """
    removes = target.group.implied_sparsity or target.sparsity
    if removes and not any((mask != mask[:, :1]).any() for mask in masks):
        raise DegenerateScores(f"'{metric}' prunes the same inputs in every row")
