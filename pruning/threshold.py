"""One exact threshold for a matrix or all matrices of a model, without a copy of all scores.

An even sample of the scores gives two values between which the threshold lies. The scores below
are counted and those in between are searched.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pruning.ranking import check_sparsity, count, kth_smallest, strictly_between

Score = Callable[[str], Tensor]
"""Computes a layer's scores, (out_features, in_features), from its name."""

_SAMPLE_STEP = 251
"""One score in this many is sampled; prime to the widths of layers."""

_SAMPLE_LIMIT = 8_000_000
"""Most scores in a sample; beyond it every second one is dropped and the step doubled."""


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
