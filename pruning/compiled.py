"""Loops over scores that numba compiles for this CPU: a row or a group of inputs at a time.

The compiled code is kept beside this file, as Python's own is, if that folder can be written to;
else every process compiles it again, which takes seconds.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_FIRST, _LAST = np.int64(np.iinfo(np.int32).min), np.iinfo(np.int32).max
_INFINITY = np.int32(0x7F800000)
"""The bits of the infinity; those of a NaN are higher, those of any other magnitude lower."""

_BLOCK = 4096
"""Scores that fit the nearest cache."""

_UNROLLED = 16
"""Longest group whose scores are all compared with each other."""

_KEPT = not sys.dont_write_bytecode and os.access(Path(__file__).parent, os.W_OK)


def compiled(function: Function) -> Function:
    """Compile a loop; it runs without the interpreter's lock."""
    return cast(Function, numba.njit(function, nogil=True, cache=_KEPT))


def compiled_loosely(function: Function) -> Function:
    """Compile a loop whose sums and minima may be taken in any order, so several at a time."""
    loose = {"reassoc", "nnan", "nsz", "contract"}
    return cast(Function, numba.njit(function, nogil=True, cache=_KEPT, fastmath=loose))


def mark_lowest_of_rows(scores: Array, removed: int) -> Array | None:
    """Mark the lowest scores of each row, ties leftmost first.

    Args:
        scores: (rows, columns), float32.
        removed: How many of each row, in [1, columns].

    Returns:
        Boolean, (rows, columns); None if a score is not finite.
    """
    mask = np.empty(scores.shape, dtype=np.bool_)
    bits = _bits(scores).reshape(scores.shape)
    return mask if _mark_lowest_of_rows(bits, removed, mask) else None


@compiled
def _mark_lowest_of_rows(bits: Array, removed: int, mask: Array) -> bool:
    rows, columns = bits.shape
    keys = np.empty(columns, np.int32)
    for row in range(rows):
        if not _keys(bits[row], keys):
            return False
        threshold, ties = _threshold(keys, removed)
        _mark(keys, threshold, ties, mask[row])
    return True


def scores_between(scores: Array, low: float, high: float) -> tuple[int, Array] | None:
    """Return how many scores are at or below `low`, and those strictly between the two.

    Args:
        scores: (rows, columns), float32.

    Returns:
        The number and the scores, (n,), float32; None if a score is not finite.
    """
    below, keys = _between(_bits(scores), _key(low), _key(high) - np.int32(1))
    if below < 0:
        return None
    inside = np.empty(len(keys), np.float32)
    _keys(keys, inside.view(np.int32))  # its own inverse, but for the zero below 0
    return below, inside


def mark_up_to(scores: Array, threshold: float, ties: int) -> tuple[Array, int]:
    """Mark the scores below a threshold and, leftmost first, up to `ties` of those equal to it.

    Args:
        scores: Finite, (rows, columns), float32.

    Returns:
        Boolean, (rows, columns), and how many of `ties` are left.
    """
    mask = np.empty(scores.shape, dtype=np.bool_)
    return mask, _mark_up_to(_bits(scores), _key(threshold), ties, mask.reshape(-1))


def _bits(scores: Array) -> Array:
    return np.ascontiguousarray(scores).view(np.int32).reshape(-1)


def _key(score: float) -> np.int32:
    key = np.empty(1, np.int32)
    _keys(_bits(np.array([score], np.float32)), key)
    return cast(np.int32, key[0])


@compiled
def _keys(bits: Array, keys: Array) -> bool:
    """Write the keys of scores by their bits, and return whether all scores are finite.

    Floats of one sign are ordered as their bits are. A key is ordered as its score, also across
    signs, and both zeros have one.
    """
    largest = np.int32(0)
    for i in range(len(keys)):
        value = bits[i]
        keys[i] = value if value >= 0 else _FIRST - value
        largest = max(largest, np.int32(value & _LAST))
    return bool(largest < _INFINITY)


@compiled
def _count_up_to(keys: Array, bound: np.int32) -> np.int32:
    count = np.int32(0)
    for i in range(len(keys)):  # not over the keys themselves, which would not be vectorized
        count = np.int32(count + (keys[i] <= bound))
    return count


@compiled
def _between(bits: Array, low: np.int32, high: np.int32) -> tuple[int, Array]:
    """Return how many keys are at or below `low`, and those above it and at or below `high`.

    The number is -1 if a score is not finite.
    """
    found = np.empty(len(bits), np.int32)
    keys = np.empty(_BLOCK, np.int32)
    marks = np.empty(_BLOCK, np.bool_)
    below = inside = 0
    for start in range(0, len(bits), _BLOCK):
        block = keys[: min(_BLOCK, len(bits) - start)]
        if not _keys(bits[start : start + _BLOCK], block):
            return -1, found[:0]
        below += int(_count_up_to(block, low))
        marks[len(block) :] = False
        for i in range(len(block)):
            marks[i] = (block[i] > low) & (block[i] <= high)
        words = marks.view(np.int64)
        for word in range(len(words)):
            if words[word] == 0:  # as most are
                continue
            for i in range(8 * word, 8 * word + 8):
                found[inside] = keys[i]
                inside += marks[i]
    return below, found[:inside].copy()


@compiled
def _threshold(keys: Array, removed: int) -> tuple[np.int32, int]:
    """Return the key up to which `removed` keys go, and how many equal to it: `_LAST` for all.

    Found by bisection: a count is so fast that counting some ten times is several times as fast as
    sorting in part.
    """
    lowest, highest = np.int32(_LAST), np.int32(_FIRST)
    for i in range(len(keys)):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    # Too few keys are at or below `low`, enough at or below `high`.
    low, up_to_low = np.int64(lowest) - 1, 0
    high, up_to_high = np.int64(highest), len(keys)
    while up_to_high != removed and high != low + 1:
        middle = (low + high) >> 1
        up_to_middle = int(_count_up_to(keys, np.int32(middle)))
        if up_to_middle < removed:
            low, up_to_low = middle, up_to_middle
        else:
            high, up_to_high = middle, up_to_middle
    return np.int32(high), _LAST if up_to_high == removed else removed - up_to_low


@compiled
def _mark(keys: Array, threshold: np.int32, ties: int, mask: Array) -> int:
    """Mark the keys below a threshold and, leftmost first, those equal to it; return `ties` left.

    Args:
        ties: How many equal ones go; `_LAST` for all.
    """
    equal = 0
    if ties != _LAST:
        for i in range(len(keys)):
            equal += keys[i] == threshold
    if equal <= ties:
        for i in range(len(keys)):
            mask[i] = keys[i] <= threshold
        return ties if ties == _LAST else ties - equal
    for i in range(len(keys)):
        tied = keys[i] == threshold and ties > 0
        ties -= tied
        mask[i] = tied or keys[i] < threshold
    return ties


@compiled
def _mark_up_to(bits: Array, threshold: np.int32, ties: int, mask: Array) -> int:
    """Mark by bits as `_mark` does by keys."""
    keys = np.empty(_BLOCK, np.int32)
    for start in range(0, len(bits), _BLOCK):
        block = keys[: min(_BLOCK, len(bits) - start)]
        _keys(bits[start : start + _BLOCK], block)
        ties = _mark(block, threshold, ties, mask[start : start + _BLOCK])
    return ties


def mark_lowest_of_groups(scores: Array, removed: int, length: int) -> Array | None:
    """Mark the lowest scores of every `length` consecutive ones of a row, ties leftmost first.

    Args:
        scores: (rows, columns), float32.
        removed: How many of each group, in [1, length).
        length: A divisor of columns.

    Returns:
        Boolean, (rows, columns); None if a score is not finite.
    """
    if length > _UNROLLED:
        marked = mark_lowest_of_rows(scores.reshape(-1, length), removed)
        return None if marked is None else marked.reshape(scores.shape)
    if not _are_finite(_bits(scores)):
        return None
    mask = np.empty(scores.shape, dtype=np.bool_)
    _marker_of_groups(length)(scores.reshape(-1), removed, mask.reshape(-1))
    return mask


@compiled
def _are_finite(bits: Array) -> bool:
    largest = np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, np.int32(bits[i] & _LAST))
    return bool(largest < _INFINITY)


@cache
def _marker_of_groups(length: int) -> Callable[[Array, int, Array], None]:
    """Return a loop that is compiled for one length, so that the loops inside it are unrolled."""

    def mark(scores: Array, removed: int, mask: Array) -> None:
        for group in range(len(scores) // length):
            first = group * length
            for place in range(length):
                before = 0  # so many of the group go first
                for other in range(length):
                    if other < place:
                        before += scores[first + other] <= scores[first + place]
                    elif other > place:
                        before += scores[first + other] < scores[first + place]
                mask[first + place] = before < removed

    return compiled(mark)


def zero_marked(bits: Array, mask: Array, zeroed: Array) -> None:
    """Copy integers, (rows, columns), to `zeroed`, but write 0 where a mask is True.

    All are of one shape; the mask and `zeroed` are contiguous.
    """
    _zero_marked(np.ascontiguousarray(bits).reshape(-1), mask.reshape(-1), zeroed.reshape(-1))


@compiled
def _zero_marked(bits: Array, mask: Array, zeroed: Array) -> None:
    for i in range(len(bits)):
        zeroed[i] = 0 if mask[i] else bits[i]
