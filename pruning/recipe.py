"""What is asked of a pruning: a metric, what it removes, and the methods around it.

An allocation says how much each layer loses, a refinement improves its mask, an update and a
training change the weights that stay. `pruning.passes` makes a list of passes of it: a new pruning
method is a new value of one of these.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunevolve.pruning.allocation import Allocation, resolve_allocation
from prunevolve.pruning.compiled import zero_marked
from prunevolve.pruning.leaves import GRAM, STATISTICS, made_of
from prunevolve.pruning.masks import DegenerateScores, NOfM, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.ranking import extremes
from prunevolve.pruning.reconstruct import Reconstruction, Training
from prunevolve.pruning.sparsegpt import WIDTH, choose_given, choose_lowest, choose_n_of_m, solve
from prunevolve.pruning.swaps import MOST_SWAPS, refine

Removal = Tensor | float
"""A layer's mask, True where a weight goes, or the fraction that goes if an update chooses."""


@dataclass(frozen=True)
class Refinement:
    """A rule from a mask to a better one with as many zeros in the same places' groups.

    Attributes:
        leaves: Statistics that the rule needs, of inputs that passed the pruned blocks before.
        apply: Maps the dense weight, the mask and the layer's statistics by leaf to the new mask.
    """

    leaves: frozenset[str]
    apply: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


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
class Recipe:
    """What to remove, by which score, and what to do with the rest.

    Attributes:
        metric: The score.
        target: How much goes, and which weights compete.
        propagation: `one-shot` scores by statistics of the dense model;
            `sequential` takes those of a block's inputs from windows that passed the pruned blocks
            before it, as the Pruner-Zero release does for X.
        allocation: How much each layer gives; None for the same fraction of each, or what a
            threshold over the whole model takes.
        refinement: What improves the masks; None for nothing.
        update: What happens to the weights that stay.
        training: What happens to them once a whole block is pruned; None for nothing.

    Raises:
        ValueError: If the parts do not fit each other or the metric cannot rank weights.
    """

    metric: Metric
    target: Target
    propagation: str = "one-shot"
    allocation: Allocation | None = None
    refinement: Refinement | None = None
    update: Update = ZERO
    training: Training | None = None

    def __post_init__(self) -> None:
        self.metric.check_scores_weights()
        if self.sequential and self.target.group.whole_model:
            raise ValueError(
                "propagation must be one-shot with group model, whose threshold needs every "
                "layer's scores before the first is pruned; got 'sequential'"
            )

    @property
    def sequential(self) -> bool:
        """Whether a block's scores see what the pruned blocks before it make of the windows."""
        return self.propagation == "sequential"

    @property
    def dense_leaves(self) -> frozenset[str]:
        """The statistics of the dense model that are needed."""
        leaves = self.metric.leaves & STATISTICS - self._scored_behind
        if self.update.chooses:
            leaves = frozenset()
        if self.allocation and self.allocation.metric:
            leaves |= self.allocation.metric.leaves & STATISTICS
        return leaves

    @property
    def pruned_leaves(self) -> frozenset[str]:
        """The statistics that are needed of inputs that passed the pruned blocks before."""
        refinement = self.refinement.leaves if self.refinement else frozenset()
        return self._scored_behind | refinement | self.update.leaves

    @property
    def _scored_behind(self) -> frozenset[str]:
        of_inputs = made_of(self.metric.leaves & STATISTICS, "inputs")
        return of_inputs if self.sequential and not self.update.chooses else frozenset()

    @property
    def follows(self) -> bool:
        """Whether the calibration windows pass the pruned blocks."""
        return bool(self.pruned_leaves or self.training)

    @property
    def needs_all_scores(self) -> bool:
        """Whether no mask can be made before all layers have scores."""
        by_allocation = self.allocation is not None and self.allocation.metric is not None
        return self.target.group.whole_model or by_allocation


def make_recipe(
    metric: Metric,
    target: Target,
    propagation: str = "one-shot",
    update: str = "none",
    allocation: str = "uniform",
    refine: str = "none",
    own_masks: bool = False,
    seed: int = 0,
) -> Recipe:
    """Return a recipe; see the command line's options of these names.

    Args:
        own_masks: Whether SparseGPT makes the masks as it goes.
        seed: Of the order of windows in a reconstruction.

    Raises:
        ValueError: If a name is unknown, or parts do not fit each other; one line.
    """
    if own_masks and refine != "none":
        raise ValueError(
            f"refine must be none with metric sparsegpt, which chooses a mask column by column and "
            f"changes the weights by it at once; got {refine!r}"
        )
    if own_masks and target.group_name not in (None, "layer"):
        raise ValueError(
            "group must be left out with metric sparsegpt, which compares weights within "
            f"{WIDTH} columns of a layer; got {target.group_name!r}"
        )
    return Recipe(
        metric,
        target,
        propagation,
        resolve_allocation(allocation, target),
        _swaps(refine, target),
        _sparsegpt(target, own_masks) if own_masks or update == "sparsegpt" else ZERO,
        Reconstruction(seed) if update == "reconstruct" else None,
    )


def _swaps(argument: str, target: Target) -> Refinement | None:
    if argument == "none":
        return None
    match = re.fullmatch(r"swaps(?::([1-9]\d*))?", argument)
    if not match:
        raise ValueError(
            f"refine must be none, swaps, or swaps:N with N of 1 or more; got {argument!r}"
        )
    most = int(match[1] or MOST_SWAPS)
    length = target.group.length if isinstance(target.group, NOfM) else None

    def apply(weight: Tensor, mask: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
        return refine(weight, mask, statistics[GRAM], length, most)

    return Refinement(frozenset({GRAM}), apply)


def _sparsegpt(target: Target, chooses: bool) -> Update:
    pattern = target.group if isinstance(target.group, NOfM) else None

    def apply(weight: Tensor, removal: Removal, statistics: Mapping[str, Tensor]) -> Tensor:
        if isinstance(removal, Tensor):
            return solve(weight, statistics[GRAM], choose_given(removal))
        if pattern:
            return solve(weight, statistics[GRAM], choose_n_of_m(pattern), pattern.length)
        return solve(weight, statistics[GRAM], choose_lowest(removal))

    return Update(frozenset({GRAM}), apply, chooses)


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
