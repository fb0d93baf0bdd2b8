"""The walk over decoder blocks: collect statistics, score, mask, propagate.

`one-shot` takes all statistics from the dense model. `sequential` collects X, A and V of a block
from inputs that passed the blocks pruned before it, as the Pruner-Zero release does for X; G, B
and M are dense in both. The search evaluates its candidates through the same scores and masks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.calibration import (
    ACTIVATIONS,
    STATISTICS,
    Statistics,
    activation_statistics,
    collect,
    input_sums,
)
from pruning.masks import DegenerateScores, Target, select
from pruning.metric import Metric
from pruning.models import block_inputs, decoder_blocks, linear_layers

PROPAGATIONS = ("one-shot", "sequential")

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the units done and the units in all."""


@dataclass(frozen=True)
class LayerScores(Mapping[str, Tensor]):
    """Scores by layer name, computed when asked for and not kept.

    Attributes:
        metric: The formula.
        weights: Dense weights by layer name, (out_features, in_features), any dtype.
        statistics: Those that the metric names.
    """

    metric: Metric
    weights: Mapping[str, Tensor]
    statistics: Statistics

    def __getitem__(self, name: str) -> Tensor:
        """Return the scores of one layer, (out_features, in_features), fp32.

        Raises:
            DegenerateScores: If they are not finite or all the same; the message names the layer.
        """
        weight = self.weights[name].abs() if "W" in self.metric.leaves else None
        scores = self.metric.score(weight, **self.statistics.of(name))
        low, high = torch.aminmax(scores)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise DegenerateScores(
                f"layer {name}: the scores of '{self.metric.text}' are not finite"
            )
        if low == high:
            raise DegenerateScores(f"layer {name}: the scores of '{self.metric.text}' are constant")
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def prune(
    model: PreTrainedModel,
    metric: Metric,
    target: Target,
    windows: Tensor,
    propagation: str = "one-shot",
    on_progress: Progress = lambda stage, done, total: None,
) -> None:
    """Zero the lowest-scoring weights of a model's decoder blocks, in place.

    Args:
        windows: Calibration token ids, (N, T); unused by a metric of W alone.
        propagation: One of `PROPAGATIONS`.

    Raises:
        ValueError: If the metric cannot rank weights, a layer's scores are not finite or
            constant, n:m does not divide a layer, or `sequential` is asked of a model-wide
            threshold, which needs every layer's scores before the first is pruned.
    """
    metric.check_scores_weights()
    check_propagation(propagation, target)
    layers = linear_layers(model)
    check_pattern(layers, target)
    sequential = propagation == "sequential"
    dense_leaves = metric.leaves - ACTIVATIONS if sequential else metric.leaves
    statistics = Statistics()
    if dense_leaves & STATISTICS:
        statistics = collect(
            model,
            layers,
            windows,
            dense_leaves,
            lambda done: on_progress("calibrate", done, len(windows)),
        )
    if sequential:
        _prune_sequentially(model, metric, target, windows, statistics, on_progress)
    else:
        _prune_layers(layers, metric, target, statistics, on_progress)


@torch.no_grad()
def prune_copy(
    layers: Mapping[str, nn.Linear],
    dense: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    target: Target,
) -> None:
    """Write dense weights into a model's layers, less the lowest-scoring ones.

    Whatever was in the layers is overwritten, so one model can be pruned again and again.

    Raises:
        ValueError: As `prune` does for scores; some layers are then written and some not.
    """
    for name, mask in select(scores, target):
        _write_kept(layers[name].weight, dense[name], mask)


def _write_kept(weight: Tensor, dense: Tensor, mask: Tensor) -> None:
    # The bits times 0 or 1, in one pass: 40 times as fast on the CPU as copy and fill.
    bits = torch.int16 if dense.element_size() == 2 else torch.int32
    torch.mul(dense.view(bits), ~mask, out=weight.view(bits))


@torch.no_grad()
def restore(layers: Mapping[str, nn.Linear], dense: Mapping[str, Tensor]) -> None:
    """Write dense weights into a model's layers, bit for bit."""
    for name, layer in layers.items():
        layer.weight.copy_(dense[name])


def check_propagation(propagation: str, target: Target) -> None:
    """Raise ValueError if a propagation is unknown, or cannot serve the target's group."""
    if propagation not in PROPAGATIONS:
        raise ValueError(
            f"propagation must be one of {', '.join(PROPAGATIONS)}; got {propagation!r}"
        )
    if propagation == "sequential" and target.group.whole_model:
        raise ValueError(
            f"propagation must be one-shot with group {target.group.name}, whose threshold needs "
            "every layer's scores before the first is pruned; got 'sequential'"
        )


def check_pattern(layers: Mapping[str, nn.Linear], target: Target) -> None:
    """Raise ValueError if n:m does not divide a layer: before calibration, before a weight goes."""
    for name, layer in layers.items():
        target.group.check_layer(name, layer.in_features)


@torch.no_grad()
def _prune_layers(
    layers: Mapping[str, nn.Linear],
    metric: Metric,
    target: Target,
    statistics: Statistics,
    on_progress: Progress,
) -> None:
    weights = {name: layer.weight for name, layer in layers.items()}
    scores = LayerScores(metric, weights, statistics)
    for done, (name, mask) in enumerate(select(scores, target), 1):
        weights[name].masked_fill_(mask, 0)
        on_progress("prune", done, len(weights))


@torch.no_grad()
def _prune_sequentially(
    model: PreTrainedModel,
    metric: Metric,
    target: Target,
    windows: Tensor,
    statistics: Statistics,
    on_progress: Progress,
) -> None:
    layers = linear_layers(model)
    hidden, calls = block_inputs(model, windows)
    blocks = decoder_blocks(model)
    for i, (block_name, block) in enumerate(blocks.items()):
        own = {name: layers[name] for name in layers if name.startswith(f"{block_name}.")}
        with input_sums(own, metric.leaves) as inputs:
            for state, call in zip(hidden, calls, strict=True):
                call[i].run(block, state)
        both = replace(statistics, **activation_statistics(inputs, len(windows)))
        _prune_layers(own, metric, target, both, lambda *_: None)
        hidden = [call[i].run(block, state) for state, call in zip(hidden, calls, strict=True)]
        on_progress("prune", i + 1, len(blocks))
