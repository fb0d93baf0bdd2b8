"""How much each layer gives: fractions by layer from the scores and the sparsity of the whole."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """A rule that shares a sparsity among layers.

    Attributes:
        sees_scores: Whether the rule looks at scores; then it is given those of all layers at
            once, and no block can be pruned before all are scored.
        fractions: From the scores by layer name (computed when asked for) and the sparsity of
            the whole to the fraction of each layer, in [0, 1).
    """

    sees_scores: bool
    fractions: Callable[[Mapping[str, Tensor], float], Mapping[str, float]]


UNIFORM = Allocation(False, lambda scores, sparsity: dict.fromkeys(scores, sparsity))
"""Every layer gives the same fraction."""
