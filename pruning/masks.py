"""Scores to masks: which weights go, in each comparison group.

Masks are boolean, True where a weight goes. Counts are exact and ties go leftmost first. On the
CPU thresholds come from numpy's partial sort, which is several times faster than torch's.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAMPLE_STEP = 61
"""One score in so many says where the model's threshold lies; prime to the widths of layers."""

GROUPS = ("row", "layer", "model")
"""Comparison groups of unstructured sparsity: the weights that compete for the same places."""


@dataclass(frozen=True)
class Target:
    """What to remove: a fraction of each comparison group, or all but n of every m.

    Attributes:
        sparsity: Fraction to remove, in [0, 1).
        group: Comparison group of unstructured sparsity, one of `GROUPS`; unused by n:m.
        pattern: (kept, length) such as (2, 4), or None for unstructured sparsity.
    """

    sparsity: float
    group: str
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {self.group!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")


def parse_pattern(text: str) -> tuple[int, int] | None:
    """Return (kept, length) of a pattern such as `2:4`, or None for `unstructured`.

    Raises:
        ValueError: If the text is neither, or not 0 < n < m.
    """
    if text == "unstructured":
        return None
    kept, colon, length = text.partition(":")
    if colon and kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length) <= 1024:
        return int(kept), int(length)
    raise ValueError(f"pattern must be unstructured or n:m with 0 < n < m <= 1024, got {text!r}")


def masker(target: Target, scores_by_name: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the function that turns one layer's scores into its mask.

    For the group `model` the threshold is found here, from all scores, and the function must
    then be given the layers once each, in the mapping's order: ties go to the first layers.
    For every other target the mapping is not looked at.
    """
    if target.pattern:
        kept, length = target.pattern
        return lambda scores: lowest_n_of_m(scores, length - kept, length)
    if target.group == "row":
        return lambda scores: lowest_per_row(scores, target.sparsity)
    if target.group == "layer":
        return lambda scores: lowest_in_layer(scores, target.sparsity)
    return _model_masker(scores_by_name, target.sparsity)


def lowest_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the lowest-scoring weights of each output row for removal.

    Weights compete within their own row, the comparison group of Wanda
    (Sun et al., 2024, arXiv:2306.11695, Section 3).

    Args:
        scores: Importance of each weight, (out_features, in_features); high is kept.
        sparsity: Fraction of every row to remove, in [0, 1).

    Returns:
        Boolean mask shaped like `scores`, True where a weight goes. Every row has
        exactly int(sparsity * in_features) True entries; ties go leftmost first.

    Raises:
        ValueError: If `sparsity` is outside [0, 1), or a score is not finite.
    """
    _check(scores, sparsity)
    return _lowest(scores, int(scores.shape[1] * sparsity))


def lowest_in_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the lowest-scoring weights of the whole matrix for removal.

    Args, raises and ties as in `lowest_per_row`; the matrix has exactly
    int(sparsity * out_features * in_features) True entries.
    """
    _check(scores, sparsity)
    return _lowest(scores.reshape(1, -1), int(scores.numel() * sparsity)).reshape(scores.shape)


def lowest_n_of_m(scores: Tensor, pruned: int, group: int) -> Tensor:
    """Mark the `pruned` lowest of every `group` consecutive inputs of a row for removal.

    A kept:group pattern such as 2:4 removes group - kept weights of each group
    (Mishra et al., 2021, arXiv:2104.08378).

    Args:
        scores: Importance of each weight, (out_features, in_features); high is kept.
        pruned: Weights to remove from each group, in [1, group).
        group: Length of a group, a divisor of in_features.

    Returns:
        Boolean mask shaped like `scores`; ties go leftmost first.

    Raises:
        ValueError: If the numbers do not fit, or a score is not finite.
    """
    if not 0 < pruned < group:
        raise ValueError(f"pruned must be in [1, group), got {pruned} of {group}")
    if scores.shape[1] % group:
        raise ValueError(
            f"in_features must be a multiple of the group length {group}, got {scores.shape[1]}"
        )
    _check(scores, 0.0)
    # Rank inside each group by counting who comes before: the groups are too short for a sort.
    # One tensor for each place in the group, so that every comparison runs over whole vectors.
    groups = scores.reshape(scores.shape[0], -1, group)
    places = [place.contiguous() for place in groups.unbind(-1)]  # each (out, in / group)
    mask = torch.empty((*places[0].shape, group), dtype=torch.bool, device=scores.device)
    for own in range(group):
        before = torch.zeros_like(places[own], dtype=torch.int16)
        for other in range(group):
            if other < own:
                before += places[other] <= places[own]
            elif other > own:
                before += places[other] < places[own]
        mask[..., own] = before < pruned
    return mask.reshape(scores.shape)


def lowest_in_model(scores_by_name: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Mark the lowest-scoring weights of all matrices at once for removal.

    One threshold for the whole model, so each layer's ratio comes out of the metric itself. The
    threshold is exact: an even sample of the scores says between which two values it lies, the
    scores below are counted and those between looked through, so all scores are never copied. A
    mapping that computes its values is asked for each three times.

    Args:
        scores_by_name: Layer name to scores, each (out_features, in_features), in layer order.
        sparsity: Fraction of all weights together to remove, in [0, 1).

    Returns:
        Layer name to boolean mask. Together they have exactly int(sparsity * total) True
        entries; ties go by layer order, then leftmost first.

    Raises:
        ValueError: If `sparsity` is outside [0, 1), or a layer's scores are not finite; the
            message names the layer.
    """
    mask_of = _model_masker(scores_by_name, sparsity)
    return {name: mask_of(scores) for name, scores in scores_by_name.items()}


def _model_masker(
    scores_by_name: Mapping[str, Tensor], sparsity: float
) -> Callable[[Tensor], Tensor]:
    threshold, ties = _model_threshold(scores_by_name, sparsity)

    def mask_of(scores: Tensor) -> Tensor:
        nonlocal ties
        mask = _below(scores, threshold).contiguous()
        if ties:
            equal = torch.nonzero((scores == threshold).flatten()).flatten()[:ties]
            mask.view(-1)[equal] = True
            ties -= len(equal)
        return mask

    return mask_of


def _check(scores: Tensor, sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    low, high = torch.aminmax(scores)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("scores must be finite, got a NaN or an infinity")


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest of each row, ties leftmost first; scores are (rows, columns)."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)  # (rows, 1)
    mask = _compare(operator.le, scores, threshold)
    if _count(mask) == count * len(scores):
        return mask
    excess = mask.sum(1) - count
    for row in torch.nonzero(excess).flatten().tolist():
        # More than `count` reach down to the threshold: the rightmost ties stay.
        ties = torch.nonzero(scores[row] == threshold[row]).flatten()
        mask[row, ties[len(ties) - int(excess[row]) :]] = False
    return mask


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of each row, k counted from 1, as (rows, 1)."""
    if scores.device.type == "cpu":
        partitioned = np.partition(scores.numpy(), k - 1, axis=1)
        return torch.from_numpy(partitioned[:, k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=1, keepdim=True).values


def _compare(relation: Callable[[Any, Any], Any], scores: Tensor, threshold: Tensor) -> Tensor:
    """Return a relation of scores and threshold; on the CPU numpy is several times as fast."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.asarray(relation(scores.numpy(), threshold.numpy())))
    return relation(scores, threshold)


def _below(scores: Tensor, threshold: float) -> Tensor:
    return _compare(operator.lt, scores, torch.tensor(threshold, device=scores.device))


def _count(mask: Tensor) -> int:
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def _model_threshold(scores_by_name: Mapping[str, Tensor], sparsity: float) -> tuple[float, int]:
    """Return the score below which all go, and how many scores equal to it go too."""
    sample, total = _sample(scores_by_name, sparsity)
    count = int(total * sparsity)
    if count == 0:
        return -torch.inf, 0
    margin = 3 / max(1, len(sample)) ** 0.5  # six standard errors of the sample's median
    while True:
        low, high = _bracket(sample, count / total, margin)
        up_to_low, inside = _look_through(scores_by_name, low, high)
        rank = count - up_to_low
        if 0 < rank <= len(inside):
            threshold = float(_kth_smallest(inside[None], rank))
            return threshold, rank - _count(_below(inside, threshold))
        # The sample misled, or the bracket's end itself is the threshold, with many equal to it.
        end = low if rank <= 0 else high
        below = sum(_count(_below(scores, end)) for scores in scores_by_name.values())
        equal = sum(_count(scores == end) for scores in scores_by_name.values())
        if below < count <= below + equal:
            return end, count - below
        margin *= 8


def _sample(scores_by_name: Mapping[str, Tensor], sparsity: float) -> tuple[Tensor, int]:
    """Return every `_SAMPLE_STEP`-th score and the number of all; checks each layer."""
    parts: list[Tensor] = []
    total = 0
    for name, scores in scores_by_name.items():
        try:
            _check(scores, sparsity)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        # Started elsewhere in each layer, so that no column is sampled in every row of the model.
        parts.append(scores.flatten()[len(parts) % _SAMPLE_STEP :: _SAMPLE_STEP].float())
        total += scores.numel()
    return torch.cat(parts), total


def _bracket(sample: Tensor, fraction: float, margin: float) -> tuple[float, float]:
    """Return two values between which the quantile lies, by a sample."""
    low = int(len(sample) * (fraction - margin))
    high = 1 + int(len(sample) * (fraction + margin))
    return (
        float(_kth_smallest(sample[None], low)) if low > 0 else -torch.inf,
        float(_kth_smallest(sample[None], high)) if high <= len(sample) else torch.inf,
    )


def _look_through(
    scores_by_name: Mapping[str, Tensor], low: float, high: float
) -> tuple[int, Tensor]:
    """Return how many scores are at or below `low`, and those strictly between the two, (n,)."""
    up_to_low, inside = 0, []
    for scores in scores_by_name.values():
        bounds = torch.tensor([low, high], device=scores.device)
        above = _compare(operator.gt, scores, bounds[0])
        between = above & _compare(operator.lt, scores, bounds[1])
        if scores.device.type == "cpu":
            inside.append(torch.from_numpy(scores.numpy()[between.numpy()]))
        else:
            inside.append(scores[between])
        up_to_low += above.numel() - _count(above)
    return up_to_low, torch.cat(inside)
