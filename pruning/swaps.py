"""Swaps that refine a mask: in a row, a kept weight goes and a removed one returns.

SparseSwaps (arXiv:2512.10922): with a row's removed weights d, zero where a weight stays, the
squared error of its output on the calibration inputs is d^T H d, with H their Gram matrix. How any
one swap changes it is known in closed form; swaps are made until none lowers it.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.compiled import Array, compiled

MOST_SWAPS = 25  # in a row, where nothing else is said

_LEAST_GAIN = 1e-6  # a swap must lower a row's error by this fraction of it; less is rounding

_PROMISING = 32
"""Removed weights, those that lower the error most by returning alone, among which the best swap is
looked for first. Only if there is none are all others tried."""

_NEVER = np.float32(1e30)  # the change of the error where a swap is not allowed


def refine(
    weight: Tensor, mask: Tensor, gram: Tensor, length: int | None = None, most: int = MOST_SWAPS
) -> Tensor:
    """Return a new mask with as many zeros in each row and a lower error on the inputs.

    Args:
        weight: Dense, (out_features, in_features), any dtype.
        mask: Boolean, of the same shape, True where a weight goes.
        gram: Gram matrix of the inputs, (in_features, in_features), fp32.
        length: Weights swap places only within this many consecutive inputs; None for the row.
        most: Swaps in a row at most.
    """
    swapped = mask.cpu().numpy().copy()
    dense, inputs = (tensor.float().cpu().contiguous().numpy() for tensor in (weight, gram))
    threads = torch.get_num_threads()

    def swap(first: int) -> None:
        rows = slice(first, None, threads)
        _swap(dense[rows], swapped[rows], inputs, length or len(inputs), most)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(swap, range(threads)))  # raises what a thread has raised
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
                change = back[u] + _lowest(away, w, gram[u], 2 * w[u], start, start + length)
                if change < best:
                    best, returns = change, u
            if returns < 0:
                break
            start = returns // length * length
            near = slice(start, start + length)
            changes = away[near] - 2 * w[returns] * (w[near] * gram[returns, near])
            goes = start + np.argmin(changes)
            pull += w[goes] * gram[goes] - w[returns] * gram[returns]
            gone[returns], gone[goes] = False, True


@partial(compiled, fastmath={"reassoc", "nnan", "nsz", "contract"})  # minima in any order
def _lowest(
    away: Array, weight: Array, gram: Array, twice: np.float32, start: int, end: int
) -> np.float32:
    """Return the lowest change, but for the returning weight's own, among those that may go."""
    lowest = _NEVER
    for p in range(start, min(end, len(away))):
        change = away[p] - twice * (weight[p] * gram[p])
        lowest = change if change < lowest else lowest
    return lowest
