"""The operator table of the metric language: name, arity, tensor function, meaning.

The functions are those of the Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924), guards
included, so that a formula ranks weights here as it does there. All take and return fp32 tensors
that broadcast to (out_features, in_features).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    `shapes_by` tells which operands decide whether the result differs from row to row: "any" for
    elementwise operators, "left" for `div`, whose right operand enters as a single number.
    """

    arity: int
    function: Callable[..., Tensor]
    meaning: str
    shapes_by: str = "any"


LEAVES: dict[str, str] = {
    "W": "absolute weight",
    "G": "root of the summed squares of the loss gradient times 100",
    "X": "mean over samples of the squared norm of an input channel over tokens",
}


def _divide_by_norm(x: Tensor, y: Tensor) -> Tensor:
    # The release broadcasts before it takes the norm: a (1, in) divisor counts once for each row.
    x, y = torch.broadcast_tensors(x, y)
    return x / torch.norm(y)


def _square(x: Tensor) -> Tensor:
    return x * x


def _guarded_exp(x: Tensor) -> Tensor:
    return torch.exp(x.clamp(max=100))


def _guarded_log(x: Tensor) -> Tensor:
    return torch.log(x.abs() + 0.001)


def _guarded_sqrt(x: Tensor) -> Tensor:
    return torch.sqrt(x.abs())


def _min_max_scale(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return (x - low) / (high - low)


def _z_score(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def _same(x: Tensor) -> Tensor:
    return x


RELEASE: dict[str, Operator] = {
    "add": Operator(2, torch.add, "x + y"),
    "sub": Operator(2, torch.sub, "x - y"),
    "mul": Operator(2, torch.mul, "x * y"),
    "div": Operator(2, _divide_by_norm, "x / Frobenius norm of y (a number)", "left"),
    "sqr": Operator(1, _square, "x * x"),
    "pow": Operator(1, _square, "x * x"),
    "neg": Operator(1, torch.neg, "-x"),
    "skp": Operator(1, _same, "x"),
    "abs": Operator(1, torch.abs, "|x|"),
    "log": Operator(1, _guarded_log, "ln(|x| + 0.001)"),
    "exp": Operator(1, _guarded_exp, "exp(min(x, 100)); overflows fp32 above 88.7"),
    "sqrt": Operator(1, _guarded_sqrt, "sqrt(|x|)"),
    "tanh": Operator(1, torch.tanh, "tanh(x); saturates into ties"),
    "mms": Operator(1, _min_max_scale, "(x - min) / (max - min) over the matrix"),
    "zsn": Operator(1, _z_score, "(x - mean) / std over the matrix, unbiased std"),
}

SETS: dict[str, dict[str, Operator]] = {"release": RELEASE}
"""Operator sets that a search can draw from, by the name that the config gives."""
