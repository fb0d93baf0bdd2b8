"""Which scores are the lowest: of each row, below a threshold, over matrices; exact down to ties.

On the CPU compiled loops do it, elsewhere torch. For one threshold over matrices an even sample of
their scores gives two values between which it lies; the scores below are counted, and those in
between are searched. So no copy of all scores is needed.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning import compiled
from prunevolve.pruning.compiled import Array

Score = Callable[[str], Tensor]
"""Computes a layer's scores, (out_features, in_features), from its name."""

_SAMPLE_STEP = 251  # one score in this many is sampled; prime to the widths of layers
_SAMPLE_LIMIT = 8_000_000  # most scores; beyond it every second one is dropped, the step doubled


class DegenerateScores(ValueError):
    """Scores that no mask can be made from: not finite, or constant."""


def check_extremes(metric: str, layer: str, low: float, high: float) -> None:
    """Raise DegenerateScores if a layer's lowest and highest score show that no mask can be made.

    The rest of this file takes scores to be finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DegenerateScores(f"layer {layer}: the scores of '{metric}' are not finite")
    if low == high:
        raise DegenerateScores(f"layer {layer}: the scores of '{metric}' are constant")


def extremes(scores: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest score; NaN if there is one."""
    low, high = torch.stack(torch.aminmax(scores)).tolist()  # one wait for a GPU
    return low, high


def lowest_of_rows(scores: Tensor, removed: int) -> Tensor:
    """Mark so many of the lowest scores of each row, (rows, columns); ties go leftmost first.

    The CPU compares all dtypes as fp32.
    """
    if scores.device.type != "cpu":
        return sort_rows(scores, removed)
    mask = np.empty(scores.shape, np.bool_)
    compiled.mark_lowest_of_rows(_flat(scores).reshape(scores.shape), removed, mask)
    return torch.from_numpy(mask)


def strictly_between(scores: Tensor, low: float, high: float) -> tuple[int, Array]:
    """Return how many scores are at or below `low`, and those strictly between the two, (n,)."""
    if scores.device.type != "cpu":
        return search_between(scores, low, high)
    return compiled.scores_between(_flat(scores), np.float32(low), np.float32(high))


def up_to(scores: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """Mark scores below a threshold and the first `ties` equal to it; return ties left."""
    if scores.device.type != "cpu":
        return compare_up_to(scores, threshold, ties)
    mask = np.empty(scores.numel(), np.bool_)
    left = compiled.mark_up_to(_flat(scores), np.float32(threshold), ties, mask)
    return torch.from_numpy(mask).reshape(scores.shape), left


def _flat(scores: Tensor) -> Array:
    return scores.float().numpy().reshape(-1)


def sort_rows(scores: Tensor, removed: int) -> Tensor:
    """Do `lowest_of_rows` in torch."""
    lowest = scores.sort(dim=1, stable=True).indices[:, :removed]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def search_between(scores: Tensor, low: float, high: float) -> tuple[int, Array]:
    """Do `strictly_between` in torch."""
    inside = scores[(scores > low) & (scores < high)]
    return int((scores <= low).sum()), inside.float().cpu().numpy()


def compare_up_to(scores: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """Do `up_to` in torch."""
    equal = torch.nonzero(scores.flatten() == threshold).flatten()
    mask = (scores < threshold).flatten().index_fill_(0, equal[:ties], True)
    return mask.reshape(scores.shape), max(0, ties - len(equal))


def count(mask: Tensor) -> int:
    """Return how many entries of a mask are True."""
    return int(np.count_nonzero(mask.cpu().numpy()))  # torch is far slower on the CPU


def model_threshold(score: Score, fractions: Mapping[str, float]) -> tuple[float, int]:
    """Return the score below which all go, and how many scores equal to it go too.

    Args:
        score: Called twice for each layer, rarely more often.
        fractions: Of each layer, in [0, 1); the mean, weighted by the layers' sizes, goes of all.
    """
    sample, sizes = _sample(score, fractions)
    total = sum(sizes.values())
    removed = int(math.fsum(size * fractions[name] for name, size in sizes.items()))
    if len(different := set(fractions.values())) == 1:
        removed = int(total * different.pop())
    if removed == 0:
        return -math.inf, 0
    size = len(sample) - 2
    margin = 3 / size**0.5  # six standard errors of the sample's median
    while True:
        low = float(sample[max(0, int(size * (removed / total - margin)))])
        high = float(sample[min(size + 1, 1 + int(size * (removed / total + margin)))])
        looked = [strictly_between(score(name), low, high) for name in fractions]
        inside = np.concatenate([between for _, between in looked])
        rank = removed - sum(up_to_low for up_to_low, _ in looked)
        if 0 < rank <= len(inside):
            threshold = np.partition(inside, rank - 1)[rank - 1]
            return float(threshold), rank - int(np.count_nonzero(inside < threshold))
        # The sample misled, or the threshold is an end of the bracket that many scores equal.
        end = low if rank <= 0 else high
        lower = sum(count(score(name) < end) for name in fractions)
        equal = sum(count(score(name) == end) for name in fractions)
        if lower < removed <= lower + equal:
            return end, removed - lower
        margin *= 8


def _sample(score: Score, layers: Iterable[str]) -> tuple[Array, dict[str, int]]:
    """Return an even sample, sorted, between both infinities, and each layer's number of scores."""
    parts = [np.empty(0, np.float32)]
    sizes: dict[str, int] = {}
    step = _SAMPLE_STEP
    for name in layers:
        scores = score(name)
        # The start differs by layer, so that no column is sampled in every row of the model.
        part = scores.flatten()[len(sizes) % step :: step]
        # A copy: a view would keep the layer's scores in memory until the last layer.
        parts.append(part.to("cpu", torch.float32, copy=True).numpy())
        sizes[name] = scores.numel()
        del scores, part  # before the next layer's are computed
        if sum(map(len, parts)) > _SAMPLE_LIMIT:
            parts, step = [np.concatenate(parts)[::2].copy()], 2 * step
    sample = np.sort(np.concatenate(parts))
    return np.concatenate([[-np.inf], sample, [np.inf]], dtype=np.float32), sizes
