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

_WIDE, _SAMPLE_STEP = 1 << 14, 61
"""Columns above which a row does not fit the nearest cache: then one in so many is sampled, and
only what lies near the sample's quantile is searched. The step is prime to the widths of layers."""

_UNROLLED = 16
"""Longest group whose scores are all compared with each other."""

_KEPT = not sys.dont_write_bytecode and os.access(Path(__file__).parent, os.W_OK)


def _compiled(function: Function) -> Function:
    return cast(Function, numba.njit(function, nogil=True, cache=_KEPT))


def mark_lowest_of_rows(scores: Array, removed: int) -> Array:
    """Mark the lowest scores of each row, ties leftmost first.

    Args:
        scores: Finite, (rows, columns), float32.
        removed: How many of each row, in [1, columns].

    Returns:
        Boolean, (rows, columns).
    """
    mask = np.empty(scores.shape, dtype=np.bool_)
    _mark_lowest_of_rows(np.ascontiguousarray(scores).view(np.int32), removed, mask)
    return mask


@_compiled
def _mark_lowest_of_rows(bits: Array, removed: int, mask: Array) -> None:
    # Floats of one sign are ordered as their bits are. A key is ordered as its score, also across
    # signs, and both zeros have one.
    rows, columns = bits.shape
    keys = np.empty(columns, np.int32)
    between = np.empty(columns + 1, np.int32)
    for row in range(rows):
        for column in range(columns):
            value = bits[row, column]
            keys[column] = value if value >= 0 else _FIRST - value
        below = inside = 0
        if columns > _WIDE:
            sample = np.sort(keys[::_SAMPLE_STEP])
            middle = len(sample) * removed // columns
            margin = int(3 * len(sample) ** 0.5)  # six standard errors of the sample's median
            low = sample[max(0, middle - margin)]
            high = sample[min(len(sample) - 1, middle + margin)]
            for column in range(columns):
                key = keys[column]
                below += key <= low
                between[inside] = key
                inside += (key > low) & (key <= high)
        if below < removed <= below + inside:
            threshold, ties = _threshold(between[:inside], removed - below)
        else:
            threshold, ties = _threshold(keys, removed)
        if ties == 0:
            for column in range(columns):
                mask[row, column] = keys[column] <= threshold
            continue
        for column in range(columns):
            tied = keys[column] == threshold and ties > 0
            ties -= tied
            mask[row, column] = tied or keys[column] < threshold


@_compiled
def _threshold(keys: Array, removed: int) -> tuple[np.int32, int]:
    """Return the key up to which `removed` keys go, and how many of those equal to it: 0 if all.

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
        middle = np.int32((low + high) >> 1)
        up_to_middle = np.int32(0)
        for i in range(len(keys)):  # not over the keys themselves, which would not be vectorized
            up_to_middle = np.int32(up_to_middle + (keys[i] <= middle))
        if up_to_middle < removed:
            low, up_to_low = np.int64(middle), int(up_to_middle)
        else:
            high, up_to_high = np.int64(middle), int(up_to_middle)
    return np.int32(high), 0 if up_to_high == removed else removed - up_to_low


def mark_lowest_of_groups(scores: Array, removed: int, length: int) -> Array:
    """Mark the lowest scores of every `length` consecutive ones of a row, ties leftmost first.

    Args:
        scores: Finite, (rows, columns), float32.
        removed: How many of each group, in [1, length).
        length: A divisor of columns.

    Returns:
        Boolean, (rows, columns).
    """
    if length > _UNROLLED:
        return mark_lowest_of_rows(scores.reshape(-1, length), removed).reshape(scores.shape)
    mask = np.empty(scores.shape, dtype=np.bool_)
    _marker_of_groups(length)(scores.reshape(-1), removed, mask.reshape(-1))
    return mask


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

    return _compiled(mark)
