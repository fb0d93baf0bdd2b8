"""SparseGPT: remove weights column by column, and let those to the right make up for them.

Frantar and Alistarh, 2023, arXiv:2301.00774, Algorithm 1, with its names. The squared error of a
layer's outputs on the calibration inputs has the inputs' Gram matrix as its Hessian. What the
removal of a weight does to its row's output, the weights to the right undo as far as they can.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from prunevolve.pruning.masks import NOfM
from prunevolve.pruning.ranking import DegenerateScores, extremes, lowest_of_rows
from prunevolve.pruning.statistics import damped_factor

BLOCKSIZE = 128
"""Columns in a block: its mask is chosen at once, and the columns behind it change at its end."""

Choose = Callable[[Tensor, int], Tensor]
"""Returns which weights of some columns go, (out_features, columns), from what the removal of each
would cost, of the same shape, and from the number of columns before them."""


def choose_given(mask: Tensor) -> Choose:
    """Return the choice of a mask, (out_features, in_features), that was made beforehand."""
    return lambda cost, start: mask[:, start : start + cost.shape[1]]


def choose_lowest(fraction: float) -> Choose:
    """Return SparseGPT's own choice: of each block of columns the weights that cost least.

    All blocks so far together lose exactly the fraction, rounded down.
    """

    def choose(cost: Tensor, start: int) -> Tensor:
        rows, columns = cost.shape
        due = int(rows * (start + columns) * fraction) - int(rows * start * fraction)
        return lowest_of_rows(cost.reshape(1, -1), due).reshape(cost.shape)

    return choose


def choose_n_of_m(pattern: NOfM) -> Choose:
    """Return SparseGPT's own choice under an n:m pattern."""
    return lambda cost, start: pattern.mask(cost, pattern.implied_sparsity)


def compensate(
    weight: Tensor, removal: Tensor | float, gram: Tensor, pattern: NOfM | None = None
) -> tuple[Tensor, int]:
    """Return `solve` for a mask, or for SparseGPT's own if the fraction that goes is given."""
    if isinstance(removal, Tensor):
        return solve(weight, gram, choose_given(removal))
    if pattern:
        return solve(weight, gram, choose_n_of_m(pattern), pattern.length)
    return solve(weight, gram, choose_lowest(removal))


def solve(
    weight: Tensor, gram: Tensor, choose: Choose, blocksize: int = BLOCKSIZE
) -> tuple[Tensor, int]:
    """Return a layer's weight, fp32, some of it zero and the rest changed to make up for that.

    Beside it is how many times the damping of the Gram matrix grew tenfold.

    Args:
        weight: Dense, (out_features, in_features), any dtype.
        gram: Gram matrix of the inputs, (in_features, in_features), fp32, whose device is used.
        choose: Called for some columns at a time, with all changes so far.
        blocksize: How many columns that is.

    Raises:
        DegenerateScores: If a weight is not finite, or the Gram matrix has no Cholesky factor.
    """
    # The paper's W turned: one column of the weight is a row here, and lies together in memory.
    W = weight.to(gram.device, torch.float32).T.clone(memory_format=torch.contiguous_format)
    # The inverse of the Gram matrix is Hinv^T Hinv with Hinv upper triangular: its row j says how
    # the columns from j on answer to a change of column j. From the flipped matrix, whose factor is
    # that of Hinv's inverse.
    lower, grown = damped_factor(gram.flip(0, 1))
    if not torch.isfinite(lower).all():
        raise DegenerateScores("the Gram matrix of its inputs has no factor: try another dtype")
    identity = torch.eye(len(gram), device=gram.device)
    Hinv = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    size = max(blocksize, BLOCKSIZE // blocksize * blocksize)
    for start in range(0, len(W), size):
        columns = slice(start, min(start + size, len(W)))
        Err = _solve_block(W[columns], Hinv[columns, columns], choose, start, blocksize)
        W[columns.stop :].addmm_(Hinv[columns, columns.stop :].T, Err, alpha=-1)
    return W.T.contiguous(), grown


def _solve_block(W: Tensor, Hinv: Tensor, choose: Choose, start: int, blocksize: int) -> Tensor:
    """Change columns, (columns, out_features), in place; return the errors that others undo."""
    Err = torch.zeros_like(W)
    d = Hinv.diagonal()[:, None]
    for first in range(0, len(W), blocksize):
        part = slice(first, min(first + blocksize, len(W)))
        cost = (W[part] / d[part]).square().T.contiguous()
        if not all(map(math.isfinite, extremes(cost))):
            raise DegenerateScores("scores must be finite, got a NaN or an infinity")
        M = choose(cost, start + first).to(W.device).T
        for j in range(part.start, part.stop):
            Err[j] = torch.where(M[j - first], W[j] / d[j], 0)
            W[j:].addr_(Hinv[j, j:], Err[j], alpha=-1)
            W[j].masked_fill_(M[j - first], 0)  # exactly
    return Err
