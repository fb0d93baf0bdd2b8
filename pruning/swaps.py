"""Swaps that refine a mask: in a row, a kept weight goes and a removed one returns.

SparseSwaps (arXiv:2512.10922): with a row's removed weights d, zero where a weight stays, the
squared error of its output on the calibration inputs is d^T H d, with H their Gram matrix. The
change of it by any one swap is known in closed form, and swaps are made until none lowers the
error. The number of zeros in a row, or in a group of n:m, stays what it was.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.compiled import Array, compiled, compiled_loosely

MOST_SWAPS = 25
"""Swaps in a row where nothing else is said."""

_LEAST_GAIN = 1e-6
"""A swap must lower a row's error by this fraction of it; less is rounding."""

_PROMISING = 32
"""Removed weights, those that lower the error most by returning alone, among which the best swap is
looked for first. Only if there is none are all others tried."""

_NEVER = np.float32(1e30)
"""The change of the error where a swap is not allowed."""


def refine(
    weight: Tensor, mask: Tensor, gram: Tensor, length: int | None = None, most: int = MOST_SWAPS
) -> Tensor:
    """Return a mask with as many zeros in each row whose error on the calibration inputs is lower.

    Args:
        weight: Dense, (out_features, in_features), any dtype.
        mask: Boolean, of the same shape, True where a weight goes.
        gram: Gram matrix of the inputs, (in_features, in_features), fp32.
        length: Weights swap places only within this many consecutive inputs; None for the row.
        most: Swaps in a row at most.

    Returns:
        The mask, a new tensor on the mask's device.
    """
    swapped = mask.cpu().numpy().copy()
    dense = weight.float().cpu().contiguous().numpy()
    inputs = gram.float().cpu().contiguous().numpy()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        parts = [slice(part, None, threads) for part in range(threads)]
        work = [
            pool.submit(_swap, dense[rows], swapped[rows], inputs, length or len(inputs), most)
            for rows in parts
        ]
    for future in work:
        future.result()  # which raises what the thread has raised
    return torch.from_numpy(swapped).to(mask.device)


@compiled
def _swap(weight: Array, mask: Array, gram: Array, length: int, most: int) -> None:
    rows, columns = weight.shape
    pull = np.empty(columns)
    back, away = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for row in range(rows):
        w, gone = weight[row], mask[row]
        pull[:] = 0  # the Gram matrix times the removed weights
        for j in range(columns):
            if gone[j]:
                pull += w[j] * gram[j]
        for _ in range(most):
            error = 0.0
            for j in range(columns):
                # What the error changes by if this weight alone returns, or goes.
                own, shared = w[j] * w[j] * gram[j, j], 2 * w[j] * pull[j]
                back[j] = own - shared if gone[j] else _NEVER
                away[j] = _NEVER if gone[j] else own + shared
                error += shared / 2 if gone[j] else 0.0
            order = np.argsort(back)
            best, returns = -_LEAST_GAIN * error, -1
            for place in range(columns):
                u = order[place]
                if not gone[u] or (place >= _PROMISING and returns >= 0):
                    break
                start = u // length * length
                end = min(start + length, columns)
                change = back[u] + _lowest(away, w, gram[u], 2 * w[u], start, end)
                if change < best:
                    best, returns = change, u
            if returns < 0:
                break
            start = returns // length * length
            end = min(start + length, columns)
            changes = away[start:end] - 2 * w[returns] * (w[start:end] * gram[returns, start:end])
            goes = start + np.argmin(changes)
            pull += w[goes] * gram[goes] - w[returns] * gram[returns]
            gone[returns], gone[goes] = False, True


@compiled_loosely
def _lowest(
    away: Array, weight: Array, gram: Array, twice: np.float32, start: int, end: int
) -> np.float32:
    """Return the lowest change, but for the returning weight's own, among those that may go."""
    lowest = _NEVER
    for p in range(start, end):
        change = away[p] - twice * (weight[p] * gram[p])
        lowest = change if change < lowest else lowest
    return lowest
