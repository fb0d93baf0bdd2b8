"""SparseGPT: remove weights column by column, and let those to the right make up for them.

Frantar and Alistarh, 2023, arXiv:2301.00774, Algorithm 1, with its names. The squared error of a
layer's outputs on the calibration inputs has the inputs' Gram matrix as its Hessian. What the
removal of a weight does to its row's output, the weights to the right undo as far as they can.
"""

import math

import torch
from torch import Tensor

from prunevolve.pruning.masks import NOfM
from prunevolve.pruning.ranking import DegenerateScores, extremes, lowest_of_rows
from prunevolve.pruning.statistics import damped_factor

# Columns in a block: its mask is chosen at once, and the columns behind it change at its end.
BLOCKSIZE = 128


def compensate(
    weight: Tensor,
    removal: Tensor | float,
    gram: Tensor,
    pattern: NOfM | None = None,
    Bs: int = BLOCKSIZE,
) -> tuple[Tensor, int]:
    """Return a layer's weight, fp32, some of it zero and the rest changed to make up for that.

    Beside it is how many times the damping of the Gram matrix grew tenfold. Raises DegenerateScores
    if a cost is not finite, or the Gram matrix has no Cholesky factor.

    Args:
        weight: Dense, (out_features, in_features), any dtype.
        removal: A mask of that shape, or of whole rows or columns, for which the others make up
            all at once; or the fraction that goes: then of each `Bs` columns, after
            all changes so far, the weights whose removal costs least, or of each group of the
            pattern.
        gram: Gram matrix of the inputs, (in_features, in_features), fp32, whose device is used.
    """
    if isinstance(removal, Tensor) and removal.shape != weight.shape:
        return _without(weight.to(gram.device, torch.float32), removal.to(gram.device), gram)
    # The paper's W turned: one column of the weight is a row here, and lies together in memory.
    W = weight.to(gram.device, torch.float32).T.clone(memory_format=torch.contiguous_format)
    # The inverse of the Gram matrix is Hinv^T Hinv with Hinv upper triangular: its row j says how
    # the columns from j on answer to a change of column j. From the flipped matrix, whose factor is
    # that of Hinv's inverse.
    lower, grown = _factor(gram.flip(0, 1))
    identity = torch.eye(len(gram), device=gram.device)
    Hinv = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    if pattern and not isinstance(removal, Tensor):
        Bs = pattern.length
    B = max(Bs, BLOCKSIZE // Bs * Bs)
    for i in range(0, len(W), B):
        W1, Hinv1 = W[i : i + B], Hinv[i : i + B, i : i + B]
        Err, d = torch.zeros_like(W1), Hinv1.diagonal()[:, None]
        for j in range(len(W1)):
            if j % Bs == 0:
                cost = (W1[j : j + Bs] / d[j : j + Bs]).square().T.contiguous()
                M = _mask(cost, removal, pattern, i + j).to(W.device).T
            Err[j] = torch.where(M[j % Bs], W1[j] / d[j], 0)
            W1[j:].addr_(Hinv1[j, j:], Err[j], alpha=-1)
            W1[j].masked_fill_(M[j % Bs], 0)  # exactly
        W[i + B :].addmm_(Hinv[i : i + B, i + B :].T, Err, alpha=-1)
    return W.T.contiguous(), grown


def _without(weight: Tensor, mask: Tensor, gram: Tensor) -> tuple[Tensor, int]:
    """Return a weight without whole rows, (out, 1), or columns, (1, in), of a mask.

    The columns that stay are the ridge regression of the dense outputs on their inputs. A row that
    goes is no input of others.
    """
    changed, grown = weight.masked_fill(mask, 0), 0
    if mask.shape[0] == 1 and mask.any():
        gone, stays = mask[0], ~mask[0]
        factor, grown = _factor(gram[stays][:, stays])
        made_up = torch.cholesky_solve(gram[stays][:, gone] @ weight[:, gone].T, factor)
        changed[:, stays] += made_up.T
    return changed, grown


def _factor(gram: Tensor) -> tuple[Tensor, int]:
    """Return what `damped_factor` does, or raise DegenerateScores if there is no factor."""
    factor, grown = damped_factor(gram)
    if not torch.isfinite(factor).all():
        raise DegenerateScores("the Gram matrix of its inputs has no factor: try another dtype")
    return factor, grown


def _mask(cost: Tensor, removal: Tensor | float, pattern: NOfM | None, start: int) -> Tensor:
    """Return what goes of some columns from `start` on, given what each removal would cost."""
    rows, columns = cost.shape
    if isinstance(removal, Tensor):
        return removal[:, start : start + columns]
    if not all(map(math.isfinite, extremes(cost))):
        raise DegenerateScores("scores must be finite, got a NaN or an infinity")
    if pattern:
        return pattern.mask(cost, removal)
    # All columns so far together lose exactly the fraction, rounded down.
    due = int(rows * (start + columns) * removal) - int(rows * start * removal)
    return lowest_of_rows(cost.reshape(1, -1), due).reshape(cost.shape)
