"""Loops over scores that numba compiles for this CPU; several times as fast as torch's own.

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

_FIRST_KEY, _LAST_KEY = np.int32(-0x80000000), np.int32(0x7FFFFFFF)
_BLOCK = 4096  # scores that fit the nearest cache; a multiple of 8
_UNROLLED = 16  # longest row whose scores are all compared with each other
_KEPT = not sys.dont_write_bytecode and os.access(Path(__file__).parent, os.W_OK)


def compiled(function: Function) -> Function:
    """Compile a loop; it runs without the interpreter's lock."""
    return cast(Function, numba.njit(function, nogil=True, cache=_KEPT))


def mark_lowest_of_rows(scores: Array, removed: int, mask: Array) -> None:
    """Mark so many of each row, (rows, columns)."""
    if scores.shape[1] > _UNROLLED:
        _mark_long_rows(scores.view(np.int32), removed, mask)
    else:
        _marker_of_rows(scores.shape[1])(scores.reshape(-1), removed, mask.reshape(-1))


@cache
def _marker_of_rows(columns: int) -> Callable[[Array, int, Array], None]:
    """Return a loop that is compiled for one length of rows: the loops inside it are unrolled."""

    def mark(scores: Array, removed: int, mask: Array) -> None:
        for row in range(len(scores) // columns):
            first = row * columns
            for place in range(columns):
                before = 0  # so many of the row go first
                for other in range(columns):
                    if other < place:
                        before += scores[first + other] <= scores[first + place]
                    elif other > place:
                        before += scores[first + other] < scores[first + place]
                mask[first + place] = before < removed

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
def mark_up_to(scores: Array, threshold: np.float32, ties: int, mask: Array) -> int:
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
def scores_between(scores: Array, low: np.float32, high: np.float32) -> tuple[int, Array]:
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
