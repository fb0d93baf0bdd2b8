"""What happens to a layer's weights once its mask is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """A rule from a dense weight and its mask to the weight that is saved.

    Attributes:
        leaves: The statistics that the rule needs.
        apply: From the dense weight in its own dtype, (out_features, in_features) and never to be
            written to, the mask, True where a weight goes, and the layer's statistics by leaf, to
            the new weight.
    """

    leaves: frozenset[str]
    apply: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


ZERO = Update(
    frozenset(), lambda weight, mask, statistics: weight.masked_fill(mask.to(weight.device), 0)
)
"""The removed weights are zero, the others stay."""
