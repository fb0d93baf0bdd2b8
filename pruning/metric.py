"""The metric language: formulas as values that print, read back, and score weights.

A metric is nested calls of operators on terminals and numbers: `mul(abs(mul(W, W)), mms(G))`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning import operators
from prunevolve.pruning.formula import MAX_DEPTH, POWERS, SIGNED_POWER, Call, read_formula, refuse
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import group_of
from prunevolve.pruning.operators import MATRIX, NUMBER, OPERATORS, POWER, Shape, Units
from prunevolve.pruning.statistics import TERMINALS

MAGNITUDES = (1e-37, 1e38)  # within which a number other than 0 has full precision in fp32


def is_number(value: float) -> bool:
    """Whether a number is in the language: 0, or a magnitude within `MAGNITUDES`."""
    return value == 0 or MAGNITUDES[0] <= abs(value) <= MAGNITUDES[1]


@dataclass(frozen=True)
class Metric(Call):
    """A formula that scores every weight of a matrix; weights with low scores are pruned.

    At its root is an operator, a terminal, or a number as `Metric.constant` writes it.
    """

    operands: tuple["Metric", ...] = ()  # of the operator

    @staticmethod
    @lru_cache(1 << 14)  # a journal repeats its duplicates
    def parse(text: str) -> "Metric":
        """Read a metric from its text, `mul(W, sqrt(X))`, or from mathematics, `W * sqrt(X)`.

        Raises ValueError, one line that points at the place, if it is anything else.
        """
        metric = _made(read_formula(text))
        if metric.depth > MAX_DEPTH:  # a power may be two operators
            refuse(text, 0, f"this is deeper than {MAX_DEPTH} levels")
        return metric

    @staticmethod
    def constant(value: float) -> "Metric":
        """Return a number as a metric, rounded to fp32 and written as short as that allows.

        Raises ValueError if its magnitude is neither 0 nor within `MAGNITUDES`.
        """
        if not is_number(value):
            raise ValueError(f"a number must be 0 or within {MAGNITUDES} in size, got {value:.6g}")
        rounded = np.float32(value or 0.0)  # -0 is 0
        texts = (f"{rounded:.{digits}g}" for digits in range(1, 10))  # nine tell any two apart
        return interned(next(text for text in texts if np.float32(text) == rounded))

    def to_release_json(self) -> JsonObject:
        """Return the release's tree; `parse.read_tree` gives this metric back, node for node."""
        sides = zip(("left", "right"), self.operands, strict=False)
        return {"data": self.name} | {side: operand.to_release_json() for side, operand in sides}

    @cached_property
    def text(self) -> str:
        """The metric as text; `Metric.parse` gives this metric back, node for node."""
        if not self.operands:
            return self.name
        return f"{self.name}({', '.join(operand.text for operand in self.operands)})"

    def __str__(self) -> str:
        return self.infix

    def __repr__(self) -> str:
        return self.text

    @cached_property
    def terminals(self) -> frozenset[str]:
        """The statistics that the metric names."""
        return frozenset(node.name for node in self.nodes() if node.name in TERMINALS)

    @cached_property
    def size(self) -> int:
        """Number of nodes, terminals included, but not exponents: `power` is one, as `sqrt` is."""
        nodes = self.operands[:1] if self.name == POWER else self.operands
        return 1 + sum(operand.size for operand in nodes)

    @cached_property
    def depth(self) -> int:
        """Length of the longest path from the root to a terminal; a single terminal has depth 0."""
        return 1 + max(operand.depth for operand in self.operands) if self.operands else 0

    @cached_property
    def shape(self) -> Shape:
        """The sides along which the score can vary; `div(X, W)` varies like X."""
        if self.operands:
            return OPERATORS[self.name].typing.shape(*(x.shape for x in self.operands))
        return NUMBER if self.is_constant else TERMINALS[self.name].shape

    @property
    def is_comparable(self) -> bool:
        """Whether scores of different layers can be compared: they have no units of a layer."""
        return self.units is not None and not any(self.units.of_layer)

    @cached_property
    def units(self) -> Units | None:
        """The exponents with which the score scales with weights, activations, sides, calibration.

        None if operands do not go together, as in `add(W, X)`.
        """
        if not self.operands:
            return Units() if self.is_constant else TERMINALS[self.name].units
        units = [operand.units for operand in self.operands]
        if self.name == POWER and units[0] and self.operands[1].is_constant:
            return operators.power_of(units[0], self.operands[1].value)
        over = operators.any_side(*(operand._sides for operand in self.operands))
        return None if None in units else OPERATORS[self.name].units(*units, over=over)

    @cached_property
    def _sides(self) -> Shape:
        """The sides of the tensor: `div` broadcasts, so they can be more than those of `shape`."""
        if not self.operands:
            return self.shape
        shape = operators.any_side if self.name == "div" else OPERATORS[self.name].typing.shape
        return shape(*(operand._sides for operand in self.operands))

    @cached_property
    def problem(self) -> str:
        """Why the metric cannot rank the weights of a matrix, in one line; empty if it can."""
        if self.mistyped or self.shape == MATRIX:
            return self.mistyped
        same = "inputs of a row" if self.shape.by_row else "rows"
        rule = "it must vary with row and input, as mul(W, sqrt(X)) does"
        return f"metric '{self.text}' gives all {same} the same scores: {rule}"

    @cached_property
    def mistyped(self) -> str:
        """Which operator has operands that it cannot take, in one line; empty if none has."""
        for node in (node for node in self.nodes() if node.operands):
            typing = OPERATORS[node.name].typing
            if typing.refuses(*(x.shape for x in node.operands)):
                return f"metric '{self.text}' has {node.text}: {node.name} {typing.why}"
            if node.name == POWER and not node.operands[1].is_constant:
                return f"metric '{self.text}' has {node.text}: its exponent must be a number"
        return ""

    def nodes(self) -> Iterator["Metric"]:
        """Yield every node in prefix order, as DEAP stores a tree."""
        yield self
        for operand in self.operands:
            yield from operand.nodes()

    def check_scores_weights(self) -> "Metric":
        """Return this metric, or raise ValueError if it has a `problem`."""
        if self.problem:
            raise ValueError(self.problem)
        return self

    def score(self, **terminals: Tensor | None) -> Tensor:
        """Score every weight of one matrix, in fp32; low scores are pruned.

        It takes at least the terminals that the metric names, of their shapes, W as absolute
        weights. Scores are (out_features, in_features) if `problem` is empty, else possibly of size
        1 along a side. They may be non-finite: no mask can be made of such scores.
        """
        values: dict[Metric, Tensor] = {}
        device = torch.device("cpu")
        for name in sorted(self.terminals):
            if (tensor := terminals.get(name)) is None:
                raise ValueError(f"metric '{self.text}' uses {name}, and {name} is None: pass it")
            values[Metric(name)] = tensor.to(torch.float32)
            device = tensor.device
        try:
            torch.broadcast_shapes(*(tensor.shape for tensor in values.values()))
        except RuntimeError as error:
            shapes = ", ".join(f"{x.name} of {tuple(y.shape)}" for x, y in values.items())
            raise ValueError(f"terminals must be those of one matrix, got {shapes}") from error
        return self.evaluate(values, device)

    def evaluate(self, values: dict["Metric", Tensor], device: torch.device) -> Tensor:
        """Return the scores, given its terminals' values; what is computed is added to `values`."""
        if self in values:
            return values[self]
        if self.is_constant:  # of two dimensions, as every operator expects
            values[self] = torch.full((1, 1), self.value, dtype=torch.float32, device=device)
        else:
            operands = [operand.evaluate(values, device) for operand in self.operands]
            operator = OPERATORS[self.name]
            unsigned = operator.unsigned if self.operands[-1].never_negative else None
            values[self] = (unsigned or operator.function)(*operands)
        return values[self]

    @cached_property
    def _hash(self) -> int:  # `score` looks subtrees up by value
        return hash((self.name, self.operands))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Callable[[str], "Metric"], tuple[str]]:
        """Travel to another process as text, without the cached values."""
        return Metric.parse, (self.text,)


@lru_cache(1 << 15)
def interned(name: str, operands: tuple[Metric, ...] = ()) -> Metric:
    """Return the metric; equal ones are one object, so that what follows from it is found once."""
    return Metric(name, operands)


def _made(call: Call) -> Metric:
    if call.is_constant:
        return Metric.constant(call.value)
    operands = tuple(map(_made, call.operands))
    if call.name == SIGNED_POWER:
        return _power(operands[0], operands[1].value)
    return interned(call.name, operands)


def _power(x: Metric, exponent: float) -> Metric:
    """Return x ** c, of |x| unless c is odd."""
    if exponent == 1:
        return x
    if exponent % 2 == 1 and exponent != 3 and not x.never_negative:
        return interned("mul", (x, _power(x, exponent - 1)))
    operator = next((name for name, c in POWERS.items() if c == exponent), None)
    return interned(operator, (x,)) if operator else interned(POWER, (x, Metric.constant(exponent)))


@dataclass(frozen=True)
class Criterion:
    """A metric and the comparison group that it is meant for: what decides which weights go."""

    metric: Metric
    group: str  # one of `pruning.masks.GROUPS`; an n:m pattern has its own groups

    @staticmethod
    def parse(text: str, group: str) -> "Criterion":
        """Read a criterion; raises as `Metric.parse`, `check_scores_weights` and `group_of`."""
        return Criterion(Metric.parse(text).check_scores_weights(), group_of(group).name)

    @property
    def text(self) -> str:
        """The metric's text, without the group."""
        return self.metric.text

    def __str__(self) -> str:
        return f"{self.group}:{self.text}"
