"""Which scores are the lowest: of each row, below a threshold, over matrices; exact down to ties.

On the CPU loops do it that numba compiles, several times as fast as torch's own; elsewhere torch.
For one threshold over matrices an even sample of their scores gives two values between which it
lies; the scores below are counted, and those in between are searched. So no copy of all scores is
needed.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.core.event import Listener, register
from torch import Tensor

Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., object])
Score = Callable[[str], Tensor]  # computes a layer's, (out_features, in_features), from its name

_log = logging.getLogger(__name__)
_SAMPLE_STEP = 251  # one score in this many is sampled; prime to the widths of layers
_SAMPLE_LIMIT = 8_000_000  # most scores; beyond it every second one is dropped, the step doubled
_FIRST_KEY, _LAST_KEY = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
_BLOCK = 4096  # scores that fit the nearest cache; a multiple of 8
_UNROLLED = 16  # longest row whose scores are all compared with each other


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
        lowest = scores.sort(dim=1, stable=True).indices[:, :removed]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
    mask = np.empty(scores.shape, np.bool_)
    if (columns := scores.shape[1]) > _UNROLLED:
        bits = _flat(scores).view(np.int32).reshape(scores.shape)
        _mark_long_rows(bits, removed, mask)
    else:
        _marker_of_rows(columns)(_flat(scores), removed, mask.reshape(-1))
    return torch.from_numpy(mask)


def strictly_between(scores: Tensor, low: float, high: float) -> tuple[int, Array]:
    """Return how many scores are at or below `low`, and those strictly between the two, (n,)."""
    if scores.device.type != "cpu":
        inside = scores[(scores > low) & (scores < high)]
        return int((scores <= low).sum()), inside.float().cpu().numpy()
    return _scores_between(_flat(scores), np.float32(low), np.float32(high))


def up_to(scores: Tensor, threshold: float, ties: int) -> tuple[Tensor, int]:
    """Mark scores below a threshold and the first `ties` equal to it; return ties left."""
    if scores.device.type != "cpu":
        equal = torch.nonzero(scores.flatten() == threshold).flatten()
        below = (scores < threshold).flatten().index_fill_(0, equal[:ties], True)
        return below.reshape(scores.shape), max(0, ties - len(equal))
    mask = np.empty(scores.numel(), np.bool_)
    left = _mark_up_to(_flat(scores), np.float32(threshold), ties, mask)
    return torch.from_numpy(mask).reshape(scores.shape), left


def _flat(scores: Tensor) -> Array:
    return scores.float().numpy().reshape(-1)


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


# Loops for the CPU. Compiling them takes seconds, so the code is kept: beside this file, as
# Python's own is, or where that cannot be written to in numba's folder of the user's cache.


class _Compiling(Listener):  # type: ignore[misc]  # numba has no types
    """Says once that loops are compiled."""

    said = False

    def on_start(self, event: object) -> None:
        """Say it, if this is the first one."""
        if not self.said:
            self.said = True
            _log.warning("compiling for this processor, which takes seconds the first time")

    def on_end(self, event: object) -> None:
        """Ignore the end."""


register("numba:compile", _Compiling())


def compiled(function: Function, adds_in_any_order: bool = False) -> Function:
    """Compile a loop; it runs without the interpreter's lock."""
    freedom = {"reassoc", "contract", "nsz"} if adds_in_any_order else False
    loop = partial(numba.njit, function, nogil=True, fastmath=freedom)
    try:
        return cast(Function, loop(cache=True))
    except RuntimeError:  # neither folder can be written to
        return cast(Function, loop())


compiled_to_add = partial(compiled, adds_in_any_order=True)


@cache
def _marker_of_rows(columns: int) -> Callable[[Array, int, Array], None]:
    """Return a loop that is compiled for one length of rows: the loops inside it are unrolled."""

    def mark(scores: Array, removed: int, mask: Array) -> None:
        for row in range(len(scores) // columns):
            first = row * columns
            for column in range(columns):
                before = 0  # so many of the row go first
                for other in range(columns):
                    if other < column:
                        before += scores[first + other] <= scores[first + column]
                    elif other > column:
                        before += scores[first + other] < scores[first + column]
                mask[first + column] = before < removed

    return compiled(mark)


@compiled
def _mark_long_rows(bits: Array, removed: int, mask: Array) -> None:
    keys = np.empty(bits.shape[1], np.int32)
    for row in range(len(bits)):
        lowest, highest = _keys(bits[row], keys)
        bound, spared = _bound(keys, removed, lowest, highest)
        _mark(keys, bound, spared, mask[row])


@compiled
def _keys(bits: Array, keys: Array) -> tuple[np.int32, np.int32]:
    """Write keys that are ordered as the floats of these bits; return the lowest and the highest.

    Both zeros have one key.
    """
    lowest, highest = _LAST_KEY, _FIRST_KEY
    for i in range(len(keys)):
        key = bits[i] if bits[i] >= 0 else np.int32(_FIRST_KEY - bits[i])
        keys[i] = key
        lowest, highest = min(lowest, key), max(highest, key)
    return lowest, highest


@compiled
def _bound(keys: Array, removed: int, lowest: np.int32, highest: np.int32) -> tuple[np.int32, int]:
    """Return a key up to which enough keys lie, and how many of those equal to it are too many."""
    # Bisection: a count is fast. Too few keys are at or below `low`, enough at or below `high`.
    low, high, up_to_high = np.int64(lowest) - 1, np.int64(highest), len(keys)
    while up_to_high != removed and high != low + 1:
        middle = (low + high) >> 1
        up_to_middle = int(_count_up_to(keys, np.int32(middle)))
        if up_to_middle < removed:
            low = middle
        else:
            high, up_to_high = middle, up_to_middle
    return np.int32(high), up_to_high - removed


@compiled
def _count_up_to(values: Array, bound: np.generic) -> np.int32:
    count = np.int32(0)
    for i in range(len(values)):  # not over the values themselves: that would not be vectorized
        count = np.int32(count + (values[i] <= bound))
    return count


@compiled
def _mark(values: Array, highest: np.generic, spared: int, mask: Array) -> None:
    """Mark the values up to the highest, but spare so many of those equal to it from the right."""
    for i in range(len(values)):
        mask[i] = values[i] <= highest
    i = len(values)
    while spared > 0:
        i -= 1
        if values[i] == highest:
            mask[i] = False
            spared -= 1


@compiled
def _mark_up_to(scores: Array, threshold: np.float32, ties: int, mask: Array) -> int:
    """Mark scores, (n,), up to a threshold, but `ties` of those equal; return ties left."""
    for start in range(0, len(scores), _BLOCK):
        block = scores[start : start + _BLOCK]
        equal = np.int32(0)
        for i in range(len(block)):
            equal = np.int32(equal + (block[i] == threshold))
        spared = int(equal) - ties
        _mark(block, threshold, spared, mask[start : start + _BLOCK])
        ties = max(0, -spared)
    return ties


@compiled
def _scores_between(scores: Array, low: np.float32, high: np.float32) -> tuple[int, Array]:
    """Return how many scores, (n,), are at or below `low`, and those strictly between the two."""
    found = np.empty(len(scores), np.float32)
    marks = np.empty(_BLOCK, np.bool_)
    up_to_low = inside = 0
    for start in range(0, len(scores), _BLOCK):
        block = scores[start : start + _BLOCK]
        up_to_low += int(_count_up_to(block, low))
        for i in range(len(block)):
            marks[i] = (block[i] > low) & (block[i] < high)
        words = marks.view(np.int64)
        for word in range(len(block) // 8):
            if words[word] != 0:  # as few are
                for i in range(8 * word, 8 * word + 8):
                    found[inside] = block[i]
                    inside += marks[i]
        for i in range(len(block) // 8 * 8, len(block)):
            found[inside] = block[i]
            inside += marks[i]
    return up_to_low, found[:inside].copy()


@compiled
def zero_marked(bits: Array, mask: Array, zeroed: Array) -> None:
    """Copy integers, (rows, columns), to `zeroed`, but write 0 where a mask is True."""
    for row in range(len(bits)):
        for column in range(bits.shape[1]):
            zeroed[row, column] = bits[row, column] * (not mask[row, column])


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
