"""What happens to a layer's weights once its mask is known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.compiled import zero_marked


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
