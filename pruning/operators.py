"""The table of the metric language's operators, with meaning and shape.

The operators of `RELEASE` are those of the Pruner-Zero release (Dong et al., 2024,
arXiv:2406.02924), guards included, so that a formula ranks weights here as it does there.
`EXTENDED` adds what other published metrics need. All operators take and return fp32 tensors whose
last two dimensions broadcast to (out_features, in_features); others in front of them hold several
matrices, each of which is treated as if it were alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

_MATRIX_SIDES = (-2, -1)

SMALLEST_DIVISOR = 1e-12
"""`quot` keeps the magnitude of its divisor at or above this."""


class Shape(NamedTuple):
    """The sides of (out_features, in_features) along which a value can vary."""

    by_row: bool
    by_column: bool


class Units(NamedTuple):
    """Exponents of the three scales that layers and models do not share; the loss is the unit.

    Attributes:
        w: Of the weights. A layer computes the same if its weights grow as its inputs shrink.
        x: Of the activations that are its inputs.
        n: Of its sides: a sum over the inputs of each output has n = 1, their mean 0.
    """

    w: float = 0
    x: float = 0
    n: float = 0

    def __str__(self) -> str:
        powers = zip(self._fields, self, strict=True)
        return " ".join(n if p == 1 else f"{n}^{p:g}" for n, p in powers if p) or "none"


NO_UNITS = Units()

MATRIX = Shape(True, True)
PER_OUTPUT = Shape(True, False)
PER_INPUT = Shape(False, True)
NUMBER = Shape(False, False)


@dataclass(frozen=True)
class Typing:
    """How a result's shape follows from the operands' shapes, and which operands are refused.

    Attributes:
        shape: Maps the operands' shapes to the result's.
        refuses: Whether an operator is meaningless on operands of these shapes.
        why: The reason; follows the operator's name in a message.
    """

    shape: Callable[..., Shape]
    refuses: Callable[..., bool] = lambda *operands: False
    why: str = ""


def any_side(*operands: Shape) -> Shape:
    """Return the shape of operands broadcast together."""
    return Shape(any(x.by_row for x in operands), any(x.by_column for x in operands))


def _first(*operands: Shape) -> Shape:
    return operands[0]


def _last_is_number(*operands: Shape) -> bool:
    return operands[-1] == NUMBER


_ELEMENTWISE = Typing(any_side)
_SCALING = Typing(_first, _last_is_number, "scales over a matrix, and its operand is a number")
# The divisor enters as one number, so it adds no side.
_BY_NORM = Typing(_first, _last_is_number, "divides by a norm: use quot or mul for a number")
_PER_ROW = Typing(
    lambda x: Shape(x.by_row, False),
    lambda x: not x.by_column,
    "goes over the inputs, and its operand is the same for all of them",
)
_PER_COL = Typing(
    lambda x: Shape(False, x.by_column),
    lambda x: not x.by_row,
    "goes over the outputs, and its operand is the same for all of them",
)


# How a result's units follow from its operands'; None if they do not go together.


def _power(exponent: float, sides: float = 0) -> Callable[..., Units]:
    return lambda x, over: Units(exponent * x.w, exponent * x.x, exponent * x.n + sides)


def _joined(sign: int) -> Callable[..., Units]:
    return lambda x, y, over: Units(*(a + sign * b for a, b in zip(x, y, strict=True)))


def _by_frobenius(x: Units, y: Units, over: Shape) -> Units:
    # The root of the number of elements that the norm goes over.
    return _power(1, -(over.by_row + over.by_column) / 2)(_joined(-1)(x, y, over), over)


def _alike(x: Units, y: Units, over: Shape) -> Units | None:
    return x if x == y else None


def _of_number(x: Units, over: Shape) -> Units | None:
    return x if x == NO_UNITS else None


_SAME_UNITS = _power(1)


def _perhaps(*operands: bool) -> bool:
    return False


def _always(*operands: bool) -> bool:
    return True


def _if_all(*operands: bool) -> bool:
    return all(operands)


def _if_first(*operands: bool) -> bool:
    return operands[0]


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        arity: Number of operands.
        function: Maps the operands' values to the result.
        meaning: The result as a formula.
        never_negative: Whether the result is certainly 0 or more, given whether each operand is.
        units: Maps the operands' units to the result's; None if they do not go together, such as
            those of a sum that differ. `over` is the shape of all operands broadcast.
        typing: How the result's shape follows from the operands'.
        twin: The operator that has a mean where this one has a sum or a norm; empty if it has
            neither.
        unsigned: The same function where the last operand is certainly 0 or more, if there it
            takes less work.
    """

    arity: int
    function: Callable[..., Tensor]
    meaning: str
    never_negative: Callable[..., bool]
    units: Callable[..., Units | None]
    typing: Typing = _ELEMENTWISE
    twin: str = ""
    unsigned: Callable[..., Tensor] | None = None


def _divide_by_norm(x: Tensor, y: Tensor) -> Tensor:
    # The release broadcasts before it takes the norm: a (1, in) divisor counts once for each row.
    x, y = torch.broadcast_tensors(x, y)
    return cast(Tensor, x / torch.linalg.vector_norm(y, dim=_MATRIX_SIDES, keepdim=True))


def _divide_by_rms(x: Tensor, y: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(x, y)
    return x / _rms(y, _MATRIX_SIDES, keepdim=True)


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    smallest = SMALLEST_DIVISOR
    return x / torch.where(y < 0, y.clamp(max=-smallest), y.clamp(min=smallest))


def _quotient_by_unsigned(x: Tensor, y: Tensor) -> Tensor:
    return x / y.clamp(min=SMALLEST_DIVISOR)


def _square(x: Tensor) -> Tensor:
    return x * x


# From here on, a function of several passes writes to the matrix that its first pass has made.


def _cube(x: Tensor) -> Tensor:
    return (x * x).mul_(x)


def _guarded_exp(x: Tensor) -> Tensor:
    return x.clamp(max=100).exp_()


def _guarded_log(x: Tensor) -> Tensor:
    return x.abs().add_(0.001).log_()


def _guarded_sqrt(x: Tensor) -> Tensor:
    return x.abs().sqrt_()


def _fourth_root(x: Tensor) -> Tensor:
    # Two roots, each rounded correctly on every device; pow is not.
    return x.abs().sqrt_().sqrt_()


def _power_of_three_halves(x: Tensor) -> Tensor:
    magnitude = x.abs()
    return magnitude.sqrt().mul_(magnitude)


def _min_max_scale(x: Tensor) -> Tensor:
    low, high = x.amin(_MATRIX_SIDES, keepdim=True), x.amax(_MATRIX_SIDES, keepdim=True)
    return (x - low) / (high - low)


def _z_score(x: Tensor) -> Tensor:
    return (x - x.mean(_MATRIX_SIDES, keepdim=True)) / x.std(_MATRIX_SIDES, keepdim=True)


def _same(x: Tensor) -> Tensor:
    return x


def _rms(x: Tensor, dim: int | tuple[int, int], keepdim: bool) -> Tensor:
    return x.square().mean(dim, keepdim=keepdim).sqrt_()


RELEASE: dict[str, Operator] = {
    "add": Operator(2, torch.add, "x + y", _if_all, _alike),
    "sub": Operator(2, torch.sub, "x - y", _perhaps, _alike),
    "mul": Operator(2, torch.mul, "x * y", _if_all, _joined(1)),
    "div": Operator(
        2,
        _divide_by_norm,
        "x / ||y||, the Frobenius norm of y after broadcasting: one number",
        _if_first,
        _by_frobenius,
        _BY_NORM,
        twin="divrms",
    ),
    "sqr": Operator(1, _square, "x * x", _always, _power(2)),
    "pow": Operator(1, _square, "x * x", _always, _power(2)),
    "neg": Operator(1, torch.neg, "-x", _perhaps, _SAME_UNITS),
    "skp": Operator(1, _same, "x", _if_all, _SAME_UNITS),
    "abs": Operator(1, torch.abs, "|x|", _always, _SAME_UNITS),
    "log": Operator(1, _guarded_log, "ln(|x| + 0.001)", _perhaps, _of_number),
    "exp": Operator(
        1, _guarded_exp, "exp(min(x, 100)); overflows fp32 above 88.7", _always, _of_number
    ),
    "sqrt": Operator(1, _guarded_sqrt, "sqrt(|x|)", _always, _power(1 / 2)),
    "tanh": Operator(1, torch.tanh, "tanh(x); saturates into ties", _if_all, _of_number),
    "mms": Operator(
        1, _min_max_scale, "(x - min) / (max - min) over the matrix", _always, _power(0), _SCALING
    ),
    "zsn": Operator(
        1, _z_score, "(x - mean) / std over the matrix, unbiased std", _perhaps, _power(0), _SCALING
    ),
}

_SIDES = {
    "row": (-1, "inputs of each output", _PER_ROW),
    "col": (-2, "outputs of each input", _PER_COL),
}


def _reduction(
    side: str,
    function: Callable[..., Tensor],
    meaning: str,
    never_negative: Callable[..., bool],
    units: Callable[..., Units | None],
    twin: str = "",
) -> Operator:
    """Return the row of an operator that reduces a matrix to one of `_SIDES`."""
    dim, over, typing = _SIDES[side]
    reduce = partial(function, dim=dim, keepdim=True)
    whole = f"{meaning} over the {over}"
    return Operator(1, reduce, whole, never_negative, units, typing, twin and side + twin)


_REDUCTIONS: dict[str, tuple[Any, ...]] = {
    "sum": (torch.sum, "sum", _if_all, _power(1, 1), "mean"),
    "mean": (torch.mean, "mean", _if_all, _SAME_UNITS),
    "max": (torch.amax, "highest", _if_all, _SAME_UNITS),
    "norm": (torch.linalg.vector_norm, "L2 norm", _always, _power(1, 1 / 2), "rms"),
}

EXTENDED: dict[str, Operator] = RELEASE | {
    "quot": Operator(
        2,
        _quotient,
        "x / y; |y| is kept at or above 1e-12, its sign kept, 0 as positive",
        _if_all,
        _joined(-1),
        unsigned=_quotient_by_unsigned,
    ),
    "root4": Operator(1, _fourth_root, "|x| ** 0.25", _always, _power(1 / 4)),
    "pow15": Operator(1, _power_of_three_halves, "|x| ** 1.5", _always, _power(3 / 2)),
    "cube": Operator(1, _cube, "x * x * x, with its sign", _if_all, _power(3)),
    **{
        f"{side}{name}": _reduction(side, *row)
        for side in _SIDES
        for name, row in _REDUCTIONS.items()
    },
}

TWINS: dict[str, Operator] = {
    "divrms": Operator(
        2,
        _divide_by_rms,
        "x / the root mean square of y over the matrix: one number",
        _if_first,
        _joined(-1),
        _BY_NORM,
    ),
    **{
        f"{side}rms": _reduction(side, _rms, "root mean square", _always, _SAME_UNITS)
        for side in _SIDES
    },
}
"""What a search without units has in place of `div`, `rownorm` and `colnorm`. It draws none of
these: twice as many operators of one kind would be drawn twice as often."""

SETS: dict[str, dict[str, Operator]] = {"release": RELEASE, "extended": EXTENDED}
"""Operator sets that a search can draw from, by their name in the config."""

SETS_WITH_NUMBERS = frozenset({"extended"})
"""Sets that include numbers; the release has none."""

OPERATORS: dict[str, Operator] = EXTENDED | TWINS
"""All operators: the language reads them whatever a search draws from."""
