"""What is asked of a pruning: metric, target, propagation, allocation and update.

An allocation says how much each layer loses, an update what happens to the weights that stay. Both
are arguments of the one walk in `pruning.pruner`: a new pruning method is a new value of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.compiled import zero_marked
from pruning.leaves import STATISTICS, need_backward
from pruning.masks import DegenerateScores, Target
from pruning.metric import Metric
from pruning.ranking import Score, extremes

PROPAGATIONS = ("one-shot", "sequential")


@dataclass(frozen=True)
class Allocation:
    """A rule that distributes a sparsity over the layers.

    Attributes:
        sees_scores: Whether the rule computes scores; it then gets those of all layers, and no
            block can be pruned before all are scored.
        fractions: Maps the layers' names, the function that computes their scores and the overall
            sparsity to the fraction of each layer, in [0, 1).
    """

    sees_scores: bool
    fractions: Callable[[Sequence[str], Score, float], Mapping[str, float]]


UNIFORM = Allocation(False, lambda names, score, sparsity: dict.fromkeys(names, sparsity))
"""Every layer loses the same fraction."""


@dataclass(frozen=True)
class Update:
    """A rule from a dense weight and its mask to the weight that is saved.

    Attributes:
        leaves: The statistics that the rule needs.
        apply: Maps the dense weight in its own dtype, (out_features, in_features), the mask, True
            where a weight goes, and the layer's statistics by leaf to the new weight. The dense
            weight must not be written to.
    """

    leaves: frozenset[str]
    apply: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def _zero(weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    # The bits, so that no NaN is computed with; numpy has no bfloat16.
    integers = torch.int16 if weight.element_size() == 2 else torch.int32
    bits, mask = weight.view(integers), mask.to(weight.device)
    if weight.device.type == "cpu":
        zeroed = torch.empty_like(bits, memory_format=torch.contiguous_format)
        zero_marked(bits.numpy(), mask.contiguous().numpy(), zeroed.numpy())
        return zeroed.view(weight.dtype)
    return torch.mul(bits, ~mask).view(weight.dtype)


ZERO = Update(frozenset(), _zero)
"""Removed weights become zero, the others keep their bits."""


@dataclass(frozen=True)
class Recipe:
    """What to remove, by which score, and what to do with the rest.

    Attributes:
        metric: The score.
        target: How much goes, and which weights compete.
        propagation: One of `PROPAGATIONS`.
        allocation: How much each layer gives.
        update: What happens to the weights that stay.
    """

    metric: Metric
    target: Target
    propagation: str = "one-shot"
    allocation: Allocation = UNIFORM
    update: Update = ZERO

    @property
    def leaves(self) -> frozenset[str]:
        """The statistics that are needed."""
        return (self.metric.leaves | self.update.leaves) & STATISTICS

    @property
    def sequential(self) -> bool:
        """Whether a block sees what the pruned blocks before it make of the windows."""
        return self.propagation == "sequential"

    @property
    def needs_all_scores(self) -> bool:
        """Whether no mask can be made before all layers have scores."""
        return self.target.group.whole_model or self.allocation.sees_scores

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass of the dense model is needed."""
        return bool(need_backward(self.leaves))

    @property
    def prunes_on_the_way_back(self) -> bool:
        """Whether a block can be pruned as soon as its gradients are there."""
        return self.needs_gradients and not (self.needs_all_scores or self.sequential)

    @property
    def statistics_wait(self) -> bool:
        """Whether the dense model's statistics of all blocks wait for a later walk."""
        walks_first = self.needs_gradients or self.needs_all_scores
        return walks_first and not self.prunes_on_the_way_back

    def check(self) -> None:
        """Raise ValueError if the parts do not fit each other or the metric cannot rank weights."""
        self.metric.check_scores_weights()
        if self.propagation not in PROPAGATIONS:
            raise ValueError(
                f"propagation must be one of {', '.join(PROPAGATIONS)}; got {self.propagation!r}"
            )
        if self.sequential and self.needs_all_scores:
            raise ValueError(
                "propagation must be one-shot with group model, whose threshold needs every "
                "layer's scores before the first is pruned; got 'sequential'"
            )


def score_layer(
    metric: Metric, name: str, weight: Tensor, statistics: Mapping[str, Tensor]
) -> Tensor:
    """Return the scores of one layer, (out_features, in_features), fp32.

    Args:
        name: The layer's name, for the message of an error.
        weight: The dense weight, (out_features, in_features), any dtype.
        statistics: The layer's statistics by leaf, those that the metric names.

    Raises:
        DegenerateScores: If they are not finite or all the same; the message names the layer.
    """
    absolute = weight.abs() if "W" in metric.leaves else None
    scores = metric.score(W=absolute, **statistics)
    check_extremes(metric, name, *extremes(scores))
    return scores


def check_extremes(metric: Metric, layer: str, low: float, high: float) -> None:
    """Check that a layer's scores, by their lowest and highest, can rank its weights.

    Raises:
        DegenerateScores: If they are not finite or all the same; the message names the layer.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DegenerateScores(f"layer {layer}: the scores of '{metric.text}' are not finite")
    if low == high:
        raise DegenerateScores(f"layer {layer}: the scores of '{metric.text}' are constant")
