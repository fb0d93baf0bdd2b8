"""How much of each layer is pruned: a fraction per layer, from the scores and the sparsity."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """A rule that distributes a sparsity over the layers.

    Attributes:
        sees_scores: Whether the rule looks at scores; it then gets those of all layers at
            once, and no block can be pruned before all are scored.
        fractions: Maps the scores by layer name (computed on access) and the overall sparsity
            to the fraction of each layer, in [0, 1).
    """

    sees_scores: bool
    fractions: Callable[[Mapping[str, Tensor], float], Mapping[str, float]]


UNIFORM = Allocation(False, lambda scores, sparsity: dict.fromkeys(scores, sparsity))
"""Every layer loses the same fraction."""
