"""The table of the metric language's operators, with meaning, shape and units.

Those of `RELEASE` are as in the Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924), guards
included, so that a formula ranks weights here as there. `EXTENDED` adds what other published
metrics need. They take and return fp32 tensors whose last two dimensions broadcast to
(out_features, in_features); others in front hold several matrices, each treated as if alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_MATRIX_SIDES = (-2, -1)

SMALLEST_DIVISOR = 1e-12  # `quot` keeps the magnitude of its divisor at or above this


class Shape(NamedTuple):
    """The sides of (out_features, in_features) along which a value can vary."""

    by_row: bool
    by_column: bool

    def sizes(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the sides of a value in a layer of these."""
        return rows if self.by_row else 1, columns if self.by_column else 1


class Units(NamedTuple):
    """Exponents of the scales that layers, models or calibrations do not share; loss is the unit.

    All layers share the last two, so that their scores can be compared while they have these.
    """

    w: float = 0  # of the weights: a layer computes the same if they grow as its inputs shrink
    x: float = 0  # of the activations that are its inputs
    n: float = 0  # of its sides: a sum over the inputs of each output has n = 1, their mean 0
    s: float = 0  # of the number of calibration windows
    t: float = 0  # of the tokens of a calibration window

    @property
    def of_layer(self) -> tuple[float, ...]:
        """Those that layers do not share: scores that compete must have none."""
        return self[:3]

    def __str__(self) -> str:
        powers = zip(self._fields, self, strict=True)
        return " ".join(n if p == 1 else f"{n}^{p:g}" for n, p in powers if p) or "none"


MATRIX = Shape(True, True)
PER_OUTPUT = Shape(True, False)
PER_INPUT = Shape(False, True)
NUMBER = Shape(False, False)


@dataclass(frozen=True)
class Typing:
    """How a result's shape follows from the operands' shapes, and which operands are refused."""

    shape: Callable[..., Shape]
    refuses: Callable[..., bool] = lambda *shapes: False  # whether it would be meaningless
    why: str = ""  # follows the operator's name in a message


def any_side(*operands: Shape) -> Shape:
    """Return the shape of operands broadcast together."""
    return Shape(any(x.by_row for x in operands), any(x.by_column for x in operands))


_SCALING = Typing(
    lambda x: x, lambda x: x == NUMBER, "scales over a matrix, and its operand is a number"
)
# The divisor enters as one number, so it adds no side.
_BY_NORM = Typing(
    lambda x, y: x, lambda x, y: y == NUMBER, "divides by a norm: use quot or mul for a number"
)
_PER_ROW = Typing(
    lambda x: Shape(x.by_row, False), lambda x: not x.by_column, "needs what varies by input"
)
_PER_COL = Typing(
    lambda x: Shape(False, x.by_column), lambda x: not x.by_row, "needs what varies by output"
)


_NONE = Units()


# How a result's units follow from its operands'; None if they do not go together.


def _power(exponent: float, sides: float = 0) -> Callable[..., Units]:
    """Return those of a power, and of so many sides that it sums over."""
    return lambda x, over: power_of(x, exponent, Units(n=sides))


def power_of(x: Units, exponent: float, y: Units = _NONE) -> Units:
    """Return the units of a power of what has these, times what has others."""
    # Rounded, so that tenths that cancel are none.
    return Units(*(round(exponent * a + b, 6) for a, b in zip(x, y, strict=True)))


def _joined(sign: int) -> Callable[..., Units]:
    return lambda x, y, over: power_of(y, sign, x)


def _by_frobenius(x: Units, y: Units, over: Shape) -> Units:
    # The root of the number of elements that the norm goes over.
    return power_of(y, -1, x._replace(n=x.n - (over.by_row + over.by_column) / 2))


def _alike(x: Units, y: Units, over: Shape) -> Units | None:
    return x if x == y else None


def _of_number(x: Units, over: Shape) -> Units | None:
    return x if x == _NONE else None


_SAME_UNITS = _power(1)


Function = Callable[..., Tensor]  # of the operands' values
UnitsOf = Callable[..., Units | None]  # of the operands' units, and of the shape of all broadcast
NeverNegative = bool | Callable[[Sequence[bool]], bool]


@dataclass(frozen=True)
class Operator:
    """One row of the table."""

    arity: int
    function: Function
    meaning: str  # the result as a formula
    # Whether the result is certainly 0 or more, perhaps given which operands are.
    never_negative: NeverNegative
    # None if the operands' do not go together, such as those of a sum that differ.
    units: UnitsOf
    typing: Typing = Typing(any_side)
    twin: str = ""  # the operator that has a mean where this one has a sum or a norm
    unsigned: Function | None = None  # quicker where the last operand is 0 or more


def _divide_by_norm(x: Tensor, y: Tensor) -> Tensor:
    # The release broadcasts before it takes the norm: a (1, in) divisor counts once for each row.
    x, y = torch.broadcast_tensors(x, y)
    norm: Tensor = torch.linalg.vector_norm(y, dim=_MATRIX_SIDES, keepdim=True)
    return x / norm


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    low, high = y.clamp(max=-SMALLEST_DIVISOR), y.clamp(min=SMALLEST_DIVISOR)
    return x / torch.where(y < 0, low, high)


def _min_max_scale(x: Tensor) -> Tensor:
    low, high = x.amin(_MATRIX_SIDES, keepdim=True), x.amax(_MATRIX_SIDES, keepdim=True)
    return (x - low) / (high - low)


def _z_score(x: Tensor) -> Tensor:
    return (x - x.mean(_MATRIX_SIDES, keepdim=True)) / x.std(_MATRIX_SIDES, keepdim=True)


def _to_the_power(x: Tensor, exponent: Tensor) -> Tensor:
    # A third of the time of `pow`, and as exact but for one bit. A negative exponent divides, so
    # what is near 0 is kept away from it as a divisor is.
    magnitude = x.abs()
    if (exponent < 0).any():
        magnitude.clamp_(min=SMALLEST_DIVISOR)
    return (magnitude.log2_() * exponent).exp2_()


def _rms(x: Tensor, dim: int | tuple[int, int], keepdim: bool) -> Tensor:
    return x.square().mean(dim, keepdim=keepdim).sqrt_()


# A function of several passes writes to the matrix that its first pass has made.

RELEASE: dict[str, Operator] = {
    "add": Operator(2, torch.add, "x + y", all, _alike),
    "sub": Operator(2, torch.sub, "x - y", False, _alike),
    "mul": Operator(2, torch.mul, "x * y", all, _joined(1)),
    "div": Operator(
        2,
        _divide_by_norm,
        "x / ||y||, the Frobenius norm of y after broadcasting: one number",
        lambda signs: signs[0],
        _by_frobenius,
        _BY_NORM,
        twin="divrms",
    ),
    "sqr": Operator(1, lambda x: x * x, "x * x", True, _power(2)),
    "pow": Operator(1, lambda x: x * x, "x * x", True, _power(2)),
    "neg": Operator(1, torch.neg, "-x", False, _SAME_UNITS),
    "skp": Operator(1, torch.positive, "x", all, _SAME_UNITS),
    "abs": Operator(1, torch.abs, "|x|", True, _SAME_UNITS),
    "log": Operator(1, lambda x: x.abs().add_(0.001).log_(), "ln(|x| + 0.001)", False, _of_number),
    "exp": Operator(
        1, lambda x: x.clamp(max=100).exp_(), "exp(min(x, 100)); inf above 88.7", True, _of_number
    ),
    "sqrt": Operator(1, lambda x: x.abs().sqrt_(), "sqrt(|x|)", True, _power(1 / 2)),
    "tanh": Operator(1, torch.tanh, "tanh(x); saturates into ties", all, _of_number),
    "mms": Operator(
        1, _min_max_scale, "(x - min) / (max - min) over the matrix", True, _power(0), _SCALING
    ),
    "zsn": Operator(
        1, _z_score, "(x - mean) / std over the matrix, unbiased std", False, _power(0), _SCALING
    ),
}

_SIDES = {"row": (-1, "inputs", _PER_ROW), "col": (-2, "outputs", _PER_COL)}

_REDUCTIONS: dict[str, tuple[Function, str, NeverNegative, UnitsOf, str]] = {
    "sum": (torch.sum, "sum", all, _power(1, 1), "mean"),
    "mean": (torch.mean, "mean", all, _SAME_UNITS, ""),
    "max": (torch.amax, "highest", all, _SAME_UNITS, ""),
    "norm": (torch.linalg.vector_norm, "L2 norm", True, _power(1, 1 / 2), "rms"),
    "rms": (_rms, "root mean square", True, _SAME_UNITS, ""),
}


def _reduction(side: str, name: str) -> Operator:
    dim, over, typing = _SIDES[side]
    function, meaning, never_negative, units, twin = _REDUCTIONS[name]
    reduce, meaning = partial(function, dim=dim, keepdim=True), f"{meaning} over the {over}"
    return Operator(1, reduce, meaning, never_negative, units, typing, twin and side + twin)


EXTENDED: dict[str, Operator] = RELEASE | {
    "quot": Operator(
        2,
        _quotient,
        "x / y; |y| is kept at or above 1e-12, its sign kept, 0 as positive",
        all,
        _joined(-1),
        unsigned=lambda x, y: x / y.clamp(min=SMALLEST_DIVISOR),
    ),
    **{x + y: _reduction(x, y) for x in _SIDES for y in ("sum", "mean", "max", "norm")},
}

POWER = "power"  # its second operand is a number, its exponent: part of it rather than a node

# The language reads all operators, whatever a search draws from.
OPERATORS: dict[str, Operator] = EXTENDED | {
    # Powers, which factor mutations and descents make; in trees grown node by node an exponent
    # could be anything. The last three are what older metrics have.
    POWER: Operator(
        2,
        _to_the_power,
        "|x| ** c for a number c; with c below 0, |x| is kept at or above 1e-12",
        True,
        lambda x, c, over: None,  # `Metric.units` knows the number
    ),
    # Two roots, each rounded correctly on every device; pow is not.
    "root4": Operator(1, lambda x: x.abs().sqrt_().sqrt_(), "|x| ** 0.25", True, _power(1 / 4)),
    "pow15": Operator(1, lambda x: x.abs().sqrt().mul_(x.abs()), "|x| ** 1.5", True, _power(3 / 2)),
    "cube": Operator(1, lambda x: (x * x).mul_(x), "x * x * x, with its sign", all, _power(3)),
    # What a search without units has in place of `div`, `rownorm` and `colnorm`. It draws none of
    # these: twice as many operators of one kind would be drawn twice as often.
    "divrms": Operator(
        2,
        lambda x, y: x / _rms(y, dim=_MATRIX_SIDES, keepdim=True),
        "x / the root mean square of y over the matrix: one number",
        lambda signs: signs[0],
        _joined(-1),
        _BY_NORM,
    ),
    **{f"{side}rms": _reduction(side, "rms") for side in _SIDES},
}

# Operator sets that a search can draw from, by name; the release's has no numbers.
SETS: dict[str, dict[str, Operator]] = {"release": RELEASE, "extended": EXTENDED}
SETS_WITH_NUMBERS = frozenset({"extended"})
