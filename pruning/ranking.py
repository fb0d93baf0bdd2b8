"""Which scores are the lowest: of each row, of a matrix, of every m inputs; exact down to ties.

On the CPU numpy's comparisons and counts are several times faster than torch's.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_CACHED = 1 << 18
"""Scores processed at a time: they and their intermediate results fit a core's cache."""

_SAMPLED, _SAMPLE_STEP = 48, 61
"""About how many scores of a row are sampled to bracket its quantile, and the largest step between
them. Steps are odd and prime to the widths of layers, so that they meet every column."""

_SMALL = 1 << 16
"""Number of scores below which a partial sort is faster than counting."""

_MOST_TIED = 0.05
"""Largest share of the scores that may have the threshold's code: with more of them to sort, a
partial sort of all is faster."""


class DegenerateScores(ValueError):
    """Scores that no mask can be made from: not finite, or constant."""


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
        ValueError: If `sparsity` is outside [0, 1), or a score is not finite
            (`DegenerateScores`).
    """
    check_scores(scores, sparsity)
    return _lowest(scores, int(scores.shape[1] * sparsity))


def lowest_in_layer(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the lowest-scoring weights of the whole matrix for removal.

    Args, raises and ties as in `lowest_per_row`; the matrix has exactly
    int(sparsity * out_features * in_features) True entries.
    """
    check_scores(scores, sparsity)
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
        ValueError: If the numbers do not fit, or a score is not finite (`DegenerateScores`).
    """
    if not 0 < pruned < group:
        raise ValueError(f"pruned must be in [1, group), got {pruned} of {group}")
    if scores.shape[1] % group:
        raise ValueError(
            f"in_features must be a multiple of the group length {group}, got {scores.shape[1]}"
        )
    check_scores(scores, 0.0)
    if scores.device.type == "cpu":
        return by_rows(lambda part: _lowest_n_of_m(part, pruned, group), scores)
    # Rank inside each group by counting which scores come first: the groups are too short to sort.
    # One tensor for each place in the group, so that every comparison runs over whole vectors.
    groups = scores.reshape(scores.shape[0], -1, group)
    places = [place.contiguous() for place in groups.unbind(-1)]  # each (out, in / group)
    mask = torch.empty((*places[0].shape, group), dtype=torch.bool, device=scores.device)
    for place in range(group):
        before = torch.zeros_like(places[place], dtype=torch.int16)
        for other in range(group):
            if other < place:
                before += places[other] <= places[place]
            elif other > place:
                before += places[other] < places[place]
        mask[..., place] = before < pruned
    return mask.reshape(scores.shape)


def check_scores(scores: Tensor, sparsity: float) -> None:
    """Check what every mask requires.

    Raises:
        ValueError: If `sparsity` is outside [0, 1).
        DegenerateScores: If a score is not finite.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    low, high = extremes(scores)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DegenerateScores("scores must be finite, got a NaN or an infinity")


def extremes(scores: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest score; NaN if there is one."""
    low, high = torch.aminmax(scores)
    return low.item(), high.item()


def by_rows(mark: Callable[[Array], Array], scores: Tensor) -> Tensor:
    """Return the mask that numpy makes, as many rows at a time as fit a core's cache."""
    values = scores.numpy()
    mask = np.empty(values.shape, dtype=np.bool_)
    step = max(1, _CACHED // values.shape[1])
    for start in range(0, len(values), step):
        mask[start : start + step] = mark(np.ascontiguousarray(values[start : start + step]))
    return torch.from_numpy(mask)


def _lowest_n_of_m(scores: Array, pruned: int, group: int) -> Array:
    """Mark the lowest of every group with numpy: each pair is compared once, for both ranks."""
    groups = scores.reshape(-1, group)
    places = [np.ascontiguousarray(groups[:, place]) for place in range(group)]
    ranks = np.zeros((group, len(groups)), dtype=np.int16 if group > 127 else np.int8)
    for later in range(group):
        for earlier in range(later):
            first = places[earlier] <= places[later]  # of equal scores the earlier goes first
            ranks[later] += first
            ranks[earlier] += ~first
    return np.stack(list(ranks < pruned), axis=1).reshape(scores.shape)


def _lowest(scores: Tensor, removed: int) -> Tensor:
    """Mark the `removed` lowest of each row, ties leftmost first; scores are (rows, columns)."""
    if removed == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        small = scores.numel() < _SMALL
        mark = _lowest_by_partition if small else _lowest_by_codes
        return by_rows(lambda part: mark(part, removed), scores)
    threshold = kth_smallest(scores, removed)  # (rows, 1)
    mask = scores <= threshold
    excess = count_rows(mask) - removed
    for row in torch.nonzero(excess).flatten().tolist():
        # More than `removed` reach down to the threshold: the rightmost ties stay.
        ties = torch.nonzero(scores[row] == threshold[row]).flatten()
        mask[row, ties[len(ties) - int(excess[row]) :]] = False
    return mask


def _lowest_by_codes(scores: Array, removed: int) -> Array:
    """Mark the `removed` lowest of each row, ties leftmost first, without sorting the row.

    A sample of each row gives two values between which its threshold lies. Scores in between get
    one of 254 codes, in order; counting passes over these bytes find the threshold's code, and only
    scores with that code are sorted. Several times as fast as a partial sort of fp32.

    Args:
        scores: Finite, (rows, columns).
        removed: In [1, columns].
    """
    columns = scores.shape[1]
    codes = _codes_of(scores, removed / columns)
    if codes is None:
        return _lowest_by_partition(scores, removed)
    # The threshold's code is above `low`, up to which there are too few scores, and at most `high`.
    low, high = (np.full(len(scores), end) for end in (-1, 255))
    up_to_low, up_to_high = np.zeros(len(scores), np.int64), np.full(len(scores), columns)
    for _ in range(8):
        middle = (low + high) >> 1
        up_to = _count_rows(codes <= middle.astype(np.uint8)[:, None])
        enough = up_to >= removed
        low, up_to_low = np.where(enough, low, middle), np.where(enough, up_to_low, up_to)
        high, up_to_high = np.where(enough, middle, high), np.where(enough, up_to, up_to_high)
    code = high.astype(np.uint8)[:, None]
    mask = codes < code
    places = np.flatnonzero(codes == code)
    if len(places) > _MOST_TIED * codes.size:
        return _lowest_by_partition(scores, removed)
    rows, values = places // columns, scores.reshape(-1)[places]
    order = np.lexsort((values, rows))  # stable: of equal scores the leftmost comes first
    tied = up_to_high - up_to_low
    rank = np.arange(len(rows)) - (np.cumsum(tied) - tied)[rows]
    mask.reshape(-1)[places[order[rank < (removed - up_to_low)[rows]]]] = True
    return mask


def _codes_of(scores: Array, fraction: float) -> Array | None:
    """Return a byte for each score, in the order of each row's scores; None if there is none.

    The byte is 0 below a bracket around the row's quantile and 255 above it.
    """
    step = min(scores.shape[1] // _SAMPLED | 1, _SAMPLE_STEP)
    sample = np.sort(scores[:, ::step], axis=1)
    last = sample.shape[1] - 1
    margin = 2.5 * (last * fraction * (1 - fraction)) ** 0.5 + 1
    low, high = (
        sample[:, [round(min(max(fraction * last + by, 0), last))]] for by in (-margin, margin)
    )
    with np.errstate(over="ignore", divide="ignore"):
        scale = 254 / (high - low)
        if not ((scale > 0) & np.isfinite(scale)).all():
            return None  # nearly equal, or too far apart for fp32
        codes = np.subtract(scores, low)
        codes *= scale
        codes += 1
    clipped: Array = np.clip(codes, 0, 255, out=codes).astype(np.uint8)
    return clipped


def _lowest_by_partition(scores: Array, removed: int) -> Array:
    """Mark as `_lowest_by_codes` does, with a partial sort of all scores."""
    threshold = np.partition(scores, removed - 1, axis=1)[:, removed - 1 : removed]
    mask = scores <= threshold
    excess = _count_rows(mask) - removed
    for row in np.flatnonzero(excess):
        # More than `removed` reach down to the threshold: the rightmost ties stay.
        ties = np.flatnonzero(scores[row] == threshold[row])
        mask[row, ties[len(ties) - excess[row] :]] = False
    return mask


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score of each row, k counted from 1, as (rows, 1)."""
    if scores.device.type == "cpu":
        partitioned = np.partition(scores.numpy(), k - 1, axis=1)
        return torch.from_numpy(partitioned[:, k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=1, keepdim=True).values


def compare(relation: Callable[[Any, Any], Any], scores: Tensor, threshold: Tensor) -> Tensor:
    """Apply a relation such as `operator.le` to scores and threshold; return a boolean tensor."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.asarray(relation(scores.numpy(), threshold.numpy())))
    return cast(Tensor, relation(scores, threshold))


def below(scores: Tensor, threshold: float) -> Tensor:
    """Mark the scores below a number."""
    return compare(operator.lt, scores, torch.tensor(threshold, device=scores.device))


def count_rows(mask: Tensor) -> Tensor:
    """Return how many entries of each row of a mask, (rows, columns), are True, as (rows,)."""
    return torch.from_numpy(_count_rows(mask.numpy())) if mask.device.type == "cpu" else mask.sum(1)


def _count_rows(mask: Array) -> Array:
    rows, columns = mask.shape
    if rows == 1:
        return np.array([np.count_nonzero(mask)])
    if columns % 8 or columns > 8 * 255:
        # numpy sums bytes forty times as fast as torch sums booleans.
        return cast(Array, np.add.reduce(mask.view(np.int8), axis=1, dtype=np.int64))
    # Eight bytes at a time; none of them can overflow.
    lanes = np.add.reduce(np.ascontiguousarray(mask).view(np.uint64), axis=1)
    return cast(Array, np.add.reduce(lanes.view(np.uint8).reshape(rows, 8), axis=1, dtype=np.int64))


def count(mask: Tensor) -> int:
    """Return how many entries of a mask are True."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))
