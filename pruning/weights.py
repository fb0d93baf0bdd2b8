"""The new weights of a layer: masked, or a part of the way from there to updated ones.

Windows held back choose the part: masks by gradients can lower the loss of little pruning below the
dense model's, and to restore the dense outputs undoes that.
"""

import math

import torch
from torch import Tensor

from prunevolve.pruning.ranking import zero_marked


def zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where a mask is True and the same bits elsewhere."""
    mask = mask.expand_as(weight)
    # The bits, so that no NaN is computed with; numpy has no bfloat16.
    integers = torch.int16 if weight.element_size() == 2 else torch.int32
    bits, mask = weight.view(integers), mask.to(weight.device)
    if weight.device.type == "cpu":
        zeros = torch.empty_like(bits, memory_format=torch.contiguous_format)
        zero_marked(bits.numpy(), mask.contiguous().numpy(), zeros.numpy())
        return zeros.view(weight.dtype)
    return torch.mul(bits, ~mask).view(weight.dtype)


def part_chosen(without: float, half: float, all_of_it: float) -> float:
    """Return the part of an update's way, in tenths, where a parabola through losses is lowest.

    Where it has no lowest point, or losses are not finite, it is the best of the three.
    """
    curve = 2 * (without - 2 * half + all_of_it)
    if math.isfinite(curve) and curve > 0:
        return round(min(max((3 * without - 4 * half + all_of_it) / (2 * curve), 0.0), 1.0), 1)
    losses = {0.0: without, 0.5: half, 1.0: all_of_it}
    return min((x for x in losses if math.isfinite(losses[x])), key=losses.__getitem__, default=0.0)


def between(dense: Tensor, changed: Tensor, part: float) -> Tensor:
    """Return weights, fp32, a part of the way from dense ones to changed ones, and 0 where these
    are.
    """
    masked = zeroed(dense, changed == 0).float()
    # Changed ones that are not finite make nothing else finite.
    return torch.lerp(masked, changed.to(masked.device).float(), part) if part else masked
