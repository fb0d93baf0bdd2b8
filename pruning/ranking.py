"""Which scores are the lowest: of each row, of every m inputs, of matrices; exact down to ties.

On the CPU compiled loops do it, several times as fast as torch. For one threshold over matrices an
even sample of their scores gives two values between which it lies; the scores below are counted,
and those in between are searched. So no copy of all scores is needed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.compiled import (
    Array,
    mark_lowest_of_groups,
    mark_lowest_of_rows,
    mark_up_to,
    scores_between,
)

Score = Callable[[str], Tensor]
"""Computes a layer's scores, (out_features, in_features), from its name."""

_SAMPLE_STEP = 251
"""One score in this many is sampled; prime to the widths of layers."""

_SAMPLE_LIMIT = 8_000_000
"""Most scores in a sample; beyond it every second one is dropped and the step doubled."""

_NOT_FINITE = "scores must be finite, got a NaN or an infinity"


class DegenerateScores(ValueError):
    """Scores that no mask can be made from: not finite, or constant."""


def lowest_per_row(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the lowest-scoring weights of each output row for removal.

    Weights compete within their own row, the comparison group of Wanda
    (Sun et al., 2024, arXiv:2306.11695, Section 3).

    Args:
        scores: Importance of each weight, (out_features, in_features), fp32; high is kept. The
            CPU compares other dtypes as fp32.
        sparsity: Fraction of every row to remove, in [0, 1).

    Returns:
        Boolean mask shaped like `scores`, True where a weight goes. Every row has
        exactly int(sparsity * in_features) True entries; ties go leftmost first.

    Raises:
        ValueError: If `sparsity` is outside [0, 1), or a score is not finite
            (`DegenerateScores`).
    """
    check_sparsity(sparsity)
    removed = int(scores.shape[1] * sparsity)
    if scores.device.type == "cpu" and removed > 0:
        return _made(mark_lowest_of_rows(scores.float().numpy(), removed))
    check_finite(scores)
    if removed == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_smallest(scores, removed)  # (rows, 1)
    mask = scores <= threshold
    excess = count_rows(mask) - removed
    for row in torch.nonzero(excess).flatten().tolist():
        # More than `removed` reach down to the threshold: the rightmost ties stay.
        ties = torch.nonzero(scores[row] == threshold[row]).flatten()
        mask[row, ties[len(ties) - int(excess[row]) :]] = False
    return mask


def lowest_n_of_m(scores: Tensor, pruned: int, group: int) -> Tensor:
    """Mark the `pruned` lowest of every `group` consecutive inputs of a row for removal.

    A kept:group pattern such as 2:4 removes group - kept weights of each group
    (Mishra et al., 2021, arXiv:2104.08378).

    Args:
        scores: Importance of each weight, as in `lowest_per_row`.
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
    if scores.device.type == "cpu":
        return _made(mark_lowest_of_groups(scores.float().numpy(), pruned, group))
    check_finite(scores)
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


def check_finite(scores: Tensor) -> None:
    """Raise DegenerateScores if a score is not finite."""
    low, high = extremes(scores)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DegenerateScores(_NOT_FINITE)


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError if a fraction to remove is outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def _made(mask: Array | None) -> Tensor:
    if mask is None:
        raise DegenerateScores(_NOT_FINITE)
    return torch.from_numpy(mask)


def extremes(scores: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest score; NaN if there is one."""
    low, high = torch.stack(torch.aminmax(scores)).tolist()  # one wait for a GPU
    return low, high


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th smallest score of each row, k counted from 1, as (rows, 1)."""
    if scores.device.type == "cpu":
        partitioned = np.partition(scores.numpy(), k - 1, axis=1)
        return torch.from_numpy(partitioned[:, k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=1, keepdim=True).values


def strictly_between(scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """Return how many scores are at or below `low`, and those strictly between the two, (n,).

    Raises:
        DegenerateScores: If a score is not finite.
    """
    if scores.device.type == "cpu":
        found = scores_between(scores.float().numpy(), low, high)
        if found is None:
            raise DegenerateScores(_NOT_FINITE)
        return found[0], torch.from_numpy(found[1])
    check_finite(scores)
    above = scores > low
    return scores.numel() - count(above), scores[above & (scores < high)]


def up_to(scores: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """Mark the scores below a threshold and, leftmost first, up to `ties` of those equal to it.

    Returns:
        The mask, shaped like `scores`, and how many of `ties` are left.
    """
    if scores.device.type == "cpu":
        marked, ties = mark_up_to(scores.float().numpy(), threshold, ties)
        return torch.from_numpy(marked), ties
    mask = (scores < threshold).contiguous()
    if ties > 0:
        equal = torch.nonzero((scores == threshold).flatten()).flatten()[:ties]
        mask.view(-1)[equal] = True
        ties -= len(equal)
    return mask, ties


def count_rows(mask: Tensor) -> Tensor:
    """Return how many entries of each row of a mask, (rows, columns), are True, as (rows,)."""
    if mask.device.type == "cpu":
        # numpy sums bytes forty times as fast as torch sums booleans.
        return torch.from_numpy(np.add.reduce(mask.numpy().view(np.int8), axis=1, dtype=np.int64))
    return mask.sum(1)


def count(mask: Tensor) -> int:
    """Return how many entries of a mask are True."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def model_threshold(score: Score, fractions: Mapping[str, float]) -> tuple[float, int]:
    """Return the score below which all go, and how many scores equal to it go too.

    Args:
        score: Called twice for each layer, rarely more often.
        fractions: Layer name, perhaps empty, to fraction, in [0, 1); together they give the number
            of scores that go, each weighted by its layer's size.

    Raises:
        ValueError: If a fraction is outside [0, 1), or a layer's scores are not finite
            (`DegenerateScores`); the message names the layer.
    """
    sample, sizes = _sample(score, fractions)
    total, removed = sum(sizes.values()), _removed(sizes, fractions)
    if removed == 0:
        _look_through(score, fractions, -torch.inf, -torch.inf)  # for what it refuses
        return -torch.inf, 0
    margin = 3 / max(1, len(sample)) ** 0.5  # six standard errors of the sample's median
    while True:
        low, high = _bracket(sample, removed / total, margin)
        up_to_low, inside = _look_through(score, fractions, low, high)
        rank = removed - up_to_low
        if 0 < rank <= len(inside):
            threshold = float(kth_smallest(inside[None], rank))
            return threshold, rank - count(inside < threshold)
        # The sample misled, or the threshold is an end of the bracket that many scores equal.
        end = low if rank <= 0 else high
        lower = sum(count(score(name) < end) for name in fractions)
        equal = sum(count(score(name) == end) for name in fractions)
        if lower < removed <= lower + equal:
            return end, removed - lower
        margin *= 8


def _sample(score: Score, fractions: Mapping[str, float]) -> tuple[Tensor, dict[str, int]]:
    """Return an even sample, (n,), and the number of scores by layer; check the fractions."""
    parts: list[Tensor] = []
    sizes: dict[str, int] = {}
    step, sampled = _SAMPLE_STEP, 0
    for name, fraction in fractions.items():
        with _named(name):
            check_sparsity(fraction)
        scores = score(name)
        # The start differs by layer, so that no column is sampled in every row of the model.
        part = scores.flatten()[len(sizes) % step :: step]
        # A copy: a view would keep the layer's scores in memory until the last layer.
        parts.append(part.to(torch.float32, copy=True))
        sizes[name] = scores.numel()
        sampled += len(part)
        del scores  # before the next layer's are computed
        if sampled > _SAMPLE_LIMIT:
            parts, step = [torch.cat(parts)[::2].clone()], 2 * step
            sampled = len(parts[0])
    return torch.cat(parts), sizes


def _removed(sizes: Mapping[str, int], fractions: Mapping[str, float]) -> int:
    """Return how many scores go in total, rounded down."""
    different = {fractions[name] for name in sizes}
    if len(different) == 1:
        return int(sum(sizes.values()) * different.pop())
    return int(math.fsum(size * fractions[name] for name, size in sizes.items()))


def _bracket(sample: Tensor, fraction: float, margin: float) -> tuple[float, float]:
    """Return two values between which the quantile lies, judging by a sample."""
    low = int(len(sample) * (fraction - margin))
    high = 1 + int(len(sample) * (fraction + margin))
    return (
        float(kth_smallest(sample[None], low)) if low > 0 else -torch.inf,
        float(kth_smallest(sample[None], high)) if high <= len(sample) else torch.inf,
    )


def _look_through(
    score: Score, names: Iterable[str], low: float, high: float
) -> tuple[int, Tensor]:
    """Return how many scores are at or below `low`, and those strictly between the two, (n,).

    Raises:
        DegenerateScores: If a layer's scores are not finite; the message names the layer.
    """
    up_to_low, inside = 0, []
    for name in names:
        scores = score(name)
        with _named(name):
            below, between = strictly_between(scores, low, high)
        del scores
        up_to_low += below
        inside.append(between)
    return up_to_low, torch.cat(inside)


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Name the layer in what is raised inside, if it has a name."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"layer {layer}: {error}" if layer else str(error)) from error
