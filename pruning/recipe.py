"""What is asked of a pruning, and the scores that follow: metric, target, propagation, seams."""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from torch import Tensor

from pruning.allocation import UNIFORM, Allocation
from pruning.leaves import STATISTICS, need_backward
from pruning.masks import DegenerateScores, Target
from pruning.metric import Metric
from pruning.ranking import extremes
from pruning.update import ZERO, Update

PROPAGATIONS = ("one-shot", "sequential")


@dataclass(frozen=True)
class LayerScores(Mapping[str, Tensor]):
    """Scores by layer name, computed when asked for and not kept.

    Attributes:
        metric: The formula.
        weights: Dense weights by layer name, (out_features, in_features), any dtype.
        statistics: From a layer's name to its statistics by leaf, those that the metric names.
    """

    metric: Metric
    weights: Mapping[str, Tensor]
    statistics: Callable[[str], Mapping[str, Tensor]]

    def __getitem__(self, name: str) -> Tensor:
        """Return the scores of one layer, (out_features, in_features), fp32.

        Raises:
            DegenerateScores: If they are not finite or all the same; the message names the layer.
        """
        weight = self.weights[name].abs() if "W" in self.metric.leaves else None
        scores = self.metric.score(W=weight, **self.statistics(name))
        check_extremes(self.metric, name, *extremes(scores))
        return scores

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def check_extremes(metric: Metric, layer: str, low: float, high: float) -> None:
    """Check that a layer's scores, by their lowest and highest, can rank its weights.

    Raises:
        DegenerateScores: If they are not finite or all the same; the message names the layer.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DegenerateScores(f"layer {layer}: the scores of '{metric.text}' are not finite")
    if low == high:
        raise DegenerateScores(f"layer {layer}: the scores of '{metric.text}' are constant")


@dataclass(frozen=True)
class KeptScores(Mapping[str, Tensor]):
    """Scores that are computed once and then kept.

    Attributes:
        scores: Computes them, by layer name.
        kept: Those already computed.
    """

    scores: Mapping[str, Tensor]
    kept: MutableMapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """Return the scores of one layer; raises what `scores` raises."""
        if name not in self.kept:
            self.kept[name] = self.scores[name]
        return self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


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
    def decides(self) -> str:
        """In which walk blocks are scored and written: `forward`, `backward` or `last`."""
        backward = bool(need_backward(self.leaves))
        if self.needs_all_scores or (self.sequential and backward):
            return "last"
        return "backward" if backward else "forward"

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
