"""Log scores and sums near a threshold, in one pass over a matrix: a step of a descent needs many.

Loops for the CPU, that numba compiles, with logarithms read off the bits of a float: its exponent,
and a polynomial in its mantissa, to 2e-5. The logarithm of 0 is finite, -88.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.ranking import Array, compiled, compiled_to_add

# log2(1 + f) / f for f in [0, 1), fitted at Chebyshev's points.
_NODES = (1 + np.cos(np.pi * (np.arange(6) + 0.5) / 6)) / 2
_A, _B, _C, _D, _E, _F = np.polyfit(_NODES, np.log2(1 + _NODES) / _NODES, 5).astype(np.float32)
_LN2 = np.float32(np.log(2))
_MANTISSA, _BYTE, _BIAS, _WIDTH = np.int32(0x7FFFFF), np.int32(0xFF), np.int32(127), np.int32(23)
_UNIT = np.float32(2.0**-23)

Matrix = tuple[Tensor, float]  # of whose magnitudes the logarithm is taken, and its factor
Bits = tuple[Array, Array]  # of two matrices
Factors = tuple[np.float32, np.float32]


def log_scores(matrices: Sequence[Matrix], by_row: Tensor, by_column: Tensor) -> Tensor:
    """Return the sum of the logarithms of one or two matrices, (out, in), times factors, and of
    what is the same along a row, (out, 1), or a column, (1, in), fp32.
    """
    scores = np.empty((len(by_row), by_column.shape[1]), np.float32)
    _score(*_pairs(matrices), by_row.numpy()[:, 0], by_column.numpy()[0], scores)
    return torch.from_numpy(scores)


def near_sums(
    matrices: Sequence[Matrix], by_row: Tensor, by_column: Tensor, worth: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over weights that are near 0 in `log_scores`: 1 there, and less by the square of
    the score to 0 at -1 and 1; times their worth, fp32, and of nearness alone.

    They are sums by row, (2, out, 1), by column, (2, 1, in), and over all, times the logarithm of
    each matrix, (matrices, 2).
    """
    rows = np.zeros((2, len(by_row)), np.float32)
    columns = np.zeros((6, by_column.shape[1]), np.float32)
    sides = by_row.numpy()[:, 0], by_column.numpy()[0]
    _add_near(*_pairs(matrices), *sides, worth.numpy(), rows, columns)
    products = columns[2:].sum(1, dtype=np.float64).reshape(2, 2)[: len(matrices)]
    of_rows, of_columns = torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:2, None]
    return of_rows, of_columns, torch.from_numpy(products)


def _pairs(matrices: Sequence[Matrix]) -> tuple[Bits, Factors]:
    """Return the bits and the factors of two matrices; of one the second is the same, times 0."""
    (x, a), (y, b), *_ = *matrices, (matrices[0][0], 0.0)
    first, second = (z.float().contiguous().view(torch.int32).numpy() for z in (x, y))
    return (first, second), (np.float32(a), np.float32(b))


@compiled
def _log(bits: np.int32) -> np.float32:
    fraction = np.float32(np.int32(bits & _MANTISSA)) * _UNIT
    exponent = np.float32(np.int32(np.int32(np.int32(bits >> _WIDTH) & _BYTE) - _BIAS))
    series = _D + fraction * (_C + fraction * (_B + fraction * _A))
    log2: np.float32 = exponent + fraction * (_F + fraction * (_E + fraction * series))
    return _LN2 * log2


@compiled
def _score(bits: Bits, factors: Factors, by_row: Array, by_column: Array, scores: Array) -> None:
    (a, b), (x, y) = bits, factors
    for i in range(len(scores)):
        for j in range(scores.shape[1]):
            log_a, log_b = _log(a[i, j]), _log(b[i, j])
            scores[i, j] = x * log_a + y * log_b + by_row[i] + by_column[j]


@compiled_to_add
def _add_near(
    bits: Bits,
    factors: Factors,
    by_row: Array,
    by_column: Array,
    worth: Array,
    rows: Array,
    columns: Array,
) -> None:
    (a, b), (x, y) = bits, factors
    for i in range(len(worth)):
        pulled_of_row = near_of_row = np.float32(0)
        for j in range(worth.shape[1]):
            log_a, log_b = _log(a[i, j]), _log(b[i, j])
            score = x * log_a + y * log_b + by_row[i] + by_column[j]
            near = max(np.float32(0), np.float32(1) - score * score)
            pulled = near * worth[i, j]
            pulled_of_row += pulled
            near_of_row += near
            columns[0, j] += pulled
            columns[1, j] += near
            columns[2, j] += pulled * log_a
            columns[3, j] += near * log_a
            columns[4, j] += pulled * log_b
            columns[5, j] += near * log_b
        rows[0, i] += pulled_of_row
        rows[1, i] += near_of_row
