"""What is asked of a pruning: a metric, what it removes, and the methods around it.

An allocation says how much each layer loses, an update and a training change the weights that stay.
`pruning.passes` makes a list of passes of it: a new pruning method is a new value of one of these.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from prunevolve.pruning.allocation import Allocation, resolve_allocation
from prunevolve.pruning.masks import DegenerateScores, NOfM, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.ranking import extremes
from prunevolve.pruning.reconstruct import Training, reconstruct
from prunevolve.pruning.sparsegpt import WIDTH, compensate
from prunevolve.pruning.statistics import GRAM, STATISTICS, need_backward, need_forward

Removal = Tensor | float
"""A layer's mask, True where a weight goes, or the fraction that goes if an update chooses."""

Update = Callable[[Tensor, Removal, Tensor], tuple[Tensor, int]]
"""Maps a dense weight, (out_features, in_features), what goes of it and the Gram matrix of its
inputs behind pruned blocks to the weight that is saved, and how many times the matrix's damping
grew; the dense weight is not written to."""


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
        update: What happens to the weights that stay; None: they keep their bits.
        own_masks: Whether the update chooses what goes.
        training: What happens to the weights once a whole block is pruned; None for nothing.

    Raises:
        ValueError: If the parts do not fit each other or the metric cannot rank weights.
    """

    metric: Metric
    target: Target
    propagation: str = "one-shot"
    allocation: Allocation | None = None
    update: Update | None = None
    own_masks: bool = False
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
    def dense_terminals(self) -> frozenset[str]:
        """The statistics of the dense model that are needed."""
        terminals = frozenset() if self.own_masks else self.metric.terminals & STATISTICS
        if self.sequential:
            terminals -= need_forward(terminals)
        if self.allocation and self.allocation.metric:
            terminals |= self.allocation.metric.terminals & STATISTICS
        return terminals

    @property
    def pruned_terminals(self) -> frozenset[str]:
        """The statistics that are needed of inputs that passed the pruned blocks before."""
        scored = need_forward(self.metric.terminals & STATISTICS)
        terminals = scored if self.sequential and not self.own_masks else frozenset()
        return terminals | {GRAM} if self.update else terminals

    @property
    def follows(self) -> bool:
        """Whether the calibration windows pass the pruned blocks."""
        return bool(self.pruned_terminals or self.training)

    @property
    def has_gradients(self) -> bool:
        """Whether a pass goes backward: for statistics, or to train what stays."""
        return bool(need_backward(self.dense_terminals) or self.training)

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
    if own_masks and target.group_name not in (None, "layer"):
        raise ValueError(
            "group must be left out with metric sparsegpt, which compares weights within "
            f"{WIDTH} columns of a layer; got {target.group_name!r}"
        )
    pattern = target.group if isinstance(target.group, NOfM) else None
    return Recipe(
        metric,
        target,
        propagation,
        resolve_allocation(allocation, target),
        partial(compensate, pattern=pattern) if own_masks or update == "sparsegpt" else None,
        own_masks,
        partial(reconstruct, seed=seed) if update == "reconstruct" else None,
    )


def score_layer(
    metric: Metric, name: str, weight: Tensor, statistics: Mapping[str, Tensor]
) -> Tensor:
    """Return the scores of one layer, (out_features, in_features), fp32.

    Args:
        name: The layer's name, for the message of an error.
        weight: The dense weight, (out_features, in_features), any dtype.
        statistics: The layer's statistics by terminal, those that the metric names.

    Raises:
        DegenerateScores: If they are not finite or all the same; the message names the layer.
    """
    absolute = weight.abs() if "W" in metric.terminals else None
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
