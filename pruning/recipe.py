"""What is asked of a pruning: metric, target, propagation, allocation and update.

An allocation says how much each layer loses, a refinement improves its mask, an update and a
training change the weights that stay. All are arguments of the one walk in `pruning.pruner`: a new
pruning method is a new value of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunevolve.pruning.compiled import zero_marked
from prunevolve.pruning.masks import DegenerateScores, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.ranking import Score, extremes
from prunevolve.pruning.statistics import STATISTICS, need_backward, need_forward

PROPAGATIONS = ("one-shot", "sequential")


Shapes = Mapping[str, Mapping[str, tuple[int, int]]]
"""(out_features, in_features) of each layer, by block and layer."""


@dataclass(frozen=True)
class Allocation:
    """A rule that distributes a sparsity over the layers.

    Attributes:
        metric: The metric whose scores, on the dense model, the rule looks at; None for none. It
            then gets those of all layers, and no block can be pruned before all are scored.
        shares: Maps the layers' shapes, the function that computes a layer's scores by that metric,
            and the target to the fraction that each layer loses, in [0, 1).
    """

    metric: Metric | None
    shares: Callable[[Shapes, Score, Target], Mapping[str, float]]


@dataclass(frozen=True)
class Refinement:
    """A rule from a mask to a better one with as many zeros in the same places' groups.

    Attributes:
        leaves: Statistics that the rule needs, of inputs that passed the pruned blocks before.
        apply: Maps the dense weight, the mask and the layer's statistics by leaf to the new mask.
    """

    leaves: frozenset[str]
    apply: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


Removal = Tensor | float
"""A layer's mask, True where a weight goes, or the fraction that goes if an update chooses."""


@dataclass(frozen=True)
class Update:
    """A rule from a dense weight and its mask to the weight that is saved.

    Attributes:
        leaves: Statistics that the rule needs, of inputs that passed the pruned blocks before.
        apply: Maps the dense weight in its own dtype, (out_features, in_features), the removal, and
            the layer's statistics by leaf to the new weight. The dense weight must not be written
            to.
        chooses: Whether the rule makes the mask itself, and gets a fraction in its place.
    """

    leaves: frozenset[str]
    apply: Callable[[Tensor, Removal, Mapping[str, Tensor]], Tensor]
    chooses: bool = False


def _zero(weight: Tensor, mask: Removal, statistics: Mapping[str, Tensor]) -> Tensor:
    assert isinstance(mask, Tensor)
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
class Lesson:
    """What one block is trained on.

    Attributes:
        windows: How many there are.
        input: Returns a window's states that enter the block behind pruned blocks, (1, T, hidden).
        target: Returns what the dense block gives behind dense blocks, of the same shape.
        run: Runs a block, or what takes its place, on such states.
    """

    windows: int
    input: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    run: Callable[[Callable[..., object], Tensor], Tensor]


Training = Callable[
    [str, nn.Module, Mapping[str, Tensor], Lesson],
    tuple[Mapping[str, Tensor], Mapping[str, Sequence[float]]],
]
"""Maps a block's name, the block, its layers' new weights and what it is trained on to the weights
that are saved, whose zeros are the same, and the errors on the way by part of the block."""


@dataclass(frozen=True)
class Recipe:
    """What to remove, by which score, and what to do with the rest.

    Attributes:
        metric: The score.
        target: How much goes, and which weights compete.
        propagation: One of `PROPAGATIONS`.
        allocation: How much each layer gives; None for the same fraction of each, or what a
            threshold over the whole model takes.
        refinement: What improves the masks; None for nothing.
        update: What happens to the weights that stay.
        training: What happens to them once a whole block is pruned; None for nothing.
    """

    metric: Metric
    target: Target
    propagation: str = "one-shot"
    allocation: Allocation | None = None
    refinement: Refinement | None = None
    update: Update = ZERO
    training: Training | None = None

    @property
    def leaves(self) -> frozenset[str]:
        """All statistics that are needed."""
        return self.dense_leaves | self.pruned_leaves

    @property
    def dense_leaves(self) -> frozenset[str]:
        """The statistics of the dense model that are needed."""
        leaves = self.metric.leaves & STATISTICS - self._scored_leaves
        if self.update.chooses:
            leaves = frozenset()
        if self.allocation and self.allocation.metric:
            leaves |= self.allocation.metric.leaves & STATISTICS
        return leaves

    @property
    def pruned_leaves(self) -> frozenset[str]:
        """The statistics that are needed of inputs that passed the pruned blocks before."""
        refined = self.refinement.leaves if self.refinement else frozenset[str]()
        return self._scored_leaves | refined | self.update.leaves

    @property
    def _scored_leaves(self) -> frozenset[str]:
        """Those of `pruned_leaves` that make scores."""
        if not self.sequential or self.update.chooses:
            return frozenset()
        return need_forward(self.metric.leaves & STATISTICS)

    @property
    def calibrated(self) -> bool:
        """Whether calibration windows are needed."""
        return bool(self.leaves or self.training)

    @property
    def sequential(self) -> bool:
        """Whether a block's scores see what the pruned blocks before it make of the windows."""
        return self.propagation == "sequential"

    @property
    def follows(self) -> bool:
        """Whether the calibration windows pass the pruned blocks."""
        return bool(self.pruned_leaves or self.training)

    @property
    def needs_all_scores(self) -> bool:
        """Whether no mask can be made before all layers have scores."""
        by_allocation = self.allocation is not None and self.allocation.metric is not None
        return self.target.group.whole_model or by_allocation

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass of the dense model is needed."""
        return bool(need_backward(self.leaves))

    @property
    def prunes_on_the_way_back(self) -> bool:
        """Whether a block can be pruned as soon as its gradients are there."""
        waits = self.needs_all_scores or self.sequential or self.follows
        return self.needs_gradients and not waits

    @property
    def statistics_wait(self) -> bool:
        """Whether the dense model's statistics of all blocks wait for a later walk."""
        walks_first = self.needs_gradients or self.needs_all_scores
        walks_first = walks_first or (self.follows and bool(self.dense_leaves))
        return walks_first and not self.prunes_on_the_way_back

    def check(self) -> None:
        """Raise ValueError if the parts do not fit each other or the metric cannot rank weights."""
        self.metric.check_scores_weights()
        if self.propagation not in PROPAGATIONS:
            raise ValueError(
                f"propagation must be one of {', '.join(PROPAGATIONS)}; got {self.propagation!r}"
            )
        if self.sequential and self.target.group.whole_model:
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
