"""The metric language: formulas as values that print, read back, and score weights.

A metric is a formula over the leaves in `pruning.statistics` and numbers, written as nested calls
of the operators in `pruning.operators`: `mul(abs(mul(W, W)), mms(G))`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from prunevolve.pruning.infix import infix
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.operators import MATRIX, NO_UNITS, NUMBER, OPERATORS, Shape, Units, any_side
from prunevolve.pruning.statistics import LEAVES
from prunevolve.pruning.syntax import Tree, number_text, read_json, read_text


@dataclass(frozen=True)
class Metric:
    """A formula that scores every weight of a matrix; weights with low scores are pruned.

    Attributes:
        name: The operator, leaf or number at the root; a number as `Metric.constant` writes it.
        operands: The metrics that the operator is applied to; empty for a leaf or number.
    """

    name: str
    operands: tuple["Metric", ...] = ()

    @staticmethod
    @lru_cache(1 << 14)  # a journal repeats its duplicates
    def parse(text: str) -> "Metric":
        """Read a metric from its text, such as `mul(W, sqrt(X))`.

        Raises:
            ValueError: If the text is anything but nested calls of known operators on leaves and
                numbers, with the right number of operands, at most `pruning.syntax.MAX_DEPTH`
                deep. The message is one line that points at the place.
        """
        return Metric._from_tree(read_text(text))

    @staticmethod
    def from_release_json(mapping: Mapping[str, Any]) -> "Metric":
        """Read a metric from the release's tree: `{"data": name, "left": {...}, "right": {...}}`.

        Raises:
            ValueError: If a node has another form, an unknown name, the wrong number of operands,
                or the tree is deeper than `pruning.syntax.MAX_DEPTH`. The message names the path
                to the node.
        """
        return Metric._from_tree(read_json(mapping))

    @staticmethod
    def constant(value: float) -> "Metric":
        """Return a number as a metric, rounded to fp32 and written as short as that allows.

        Raises:
            ValueError: If its magnitude is neither 0 nor within `pruning.syntax.MAGNITUDES`.
        """
        return Metric(number_text(value))

    @staticmethod
    def _from_tree(tree: Tree) -> "Metric":
        name, operands = tree
        return interned(name, tuple(Metric._from_tree(operand) for operand in operands))

    def to_release_json(self) -> dict[str, Any]:
        """Return the release's tree; `from_release_json` gives this metric back, node for node."""
        sides = zip(("left", "right"), self.operands, strict=False)
        return {"data": self.name} | {side: operand.to_release_json() for side, operand in sides}

    @cached_property
    def text(self) -> str:
        """The metric as text; `parse` gives this metric back, node for node."""
        if not self.operands:
            return self.name
        return f"{self.name}({', '.join(operand.text for operand in self.operands)})"

    @property
    def infix(self) -> str:
        """The metric as one line of mathematics, for people; see `pruning.infix`."""
        return infix(self)

    @property
    def is_constant(self) -> bool:
        """Whether the metric is a number."""
        return not self.operands and self.name not in LEAVES

    @property
    def value(self) -> float:
        """The number; only a constant has one."""
        assert self.is_constant, self.text
        return float(self.name)

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The statistics that the metric names: a subset of `pruning.statistics.LEAVES`."""
        return frozenset(node.name for node in self.nodes() if node.name in LEAVES)

    @cached_property
    def size(self) -> int:
        """Number of nodes, leaves included."""
        return 1 + sum(operand.size for operand in self.operands)

    @cached_property
    def depth(self) -> int:
        """Length of the longest path from the root to a leaf; a single leaf has depth 0."""
        return 1 + max(operand.depth for operand in self.operands) if self.operands else 0

    @cached_property
    def shape(self) -> Shape:
        """The sides along which the score can vary: not by row for a score made of X alone.

        The right operand of `div` counts only as a number, so `div(X, W)` varies like X.
        """
        if self.operands:
            return OPERATORS[self.name].typing.shape(*(x.shape for x in self.operands))
        return NUMBER if self.is_constant else LEAVES[self.name].shape

    @property
    def units(self) -> Units:
        """The exponents with which the score scales with weights, activations and a layer's sides.

        Scores of different layers can be compared if all are 0: see docs/METRICS.md.

        Raises:
            ValueError: If operands of an operator do not go together, as in `add(W, X)`: then the
                score has no exponents. One line that says where.
        """
        if self._units is None:
            place = next(
                x for x in self.nodes() if not x._units and all(y._units for y in x.operands)
            )
            held = ", ".join(f"{x.text} has {x._units}" for x in place.operands)
            rule = "operands of one unit" if len(place.operands) > 1 else "an operand without units"
            raise ValueError(
                f"metric '{self.text}' has {place.text}: {place.name} needs {rule}, and {held}; "
                "divide by a mean, as in quot(W, rowmean(W))"
            )
        return self._units

    @property
    def is_comparable(self) -> bool:
        """Whether scores of different layers can be compared: they have no units."""
        return self._units == NO_UNITS

    @cached_property
    def _units(self) -> Units | None:
        if not self.operands:
            return NO_UNITS if self.is_constant else LEAVES[self.name].units
        units = [operand._units for operand in self.operands]
        if None in units:
            return None
        over = any_side(*(operand._sides for operand in self.operands))
        return OPERATORS[self.name].units(*units, over=over)

    @cached_property
    def _sides(self) -> Shape:
        """The sides of the tensor: `div` broadcasts, so they can be more than those of `shape`."""
        if len(self.operands) == 1:
            return OPERATORS[self.name].typing.shape(self.operands[0]._sides)
        return any_side(*(x._sides for x in self.operands)) if self.operands else self.shape

    @cached_property
    def never_negative(self) -> bool:
        """Whether the score is certainly 0 or more, whatever the weights."""
        if self.operands:
            signs = (operand.never_negative for operand in self.operands)
            return OPERATORS[self.name].never_negative(*signs)
        return self.value >= 0 if self.is_constant else not LEAVES[self.name].signed

    @cached_property
    def problem(self) -> str:
        """Why the metric cannot rank the weights of a matrix, in one line; empty if it can."""
        if node := self._ill_typed:
            why = OPERATORS[node.name].typing.why
            return (
                f"metric '{self.text}' has {node.text}: {node.name} {why}; "
                "for example quot(W, rowsum(W)), mul(0.5, mms(G))"
            )
        if self.shape == MATRIX:
            return ""
        same = "every input of a row the same score"
        if not self.shape.by_row:
            same = "every row the same scores" if self.shape.by_column else "all weights one score"
        return (
            f"metric '{self.text}' gives {same}: a metric must vary from row to row and from "
            "input to input; for example mul(W, sqrt(X))"
        )

    @cached_property
    def _ill_typed(self) -> "Metric | None":
        """The first node, in prefix order, whose operator is meaningless on its operands."""
        if not self.operands:
            return None
        if OPERATORS[self.name].typing.refuses(*(operand.shape for operand in self.operands)):
            return self
        return next((x._ill_typed for x in self.operands if x._ill_typed), None)

    def nodes(self) -> Iterator["Metric"]:
        """Yield every node in prefix order, as DEAP stores a tree."""
        yield self
        for operand in self.operands:
            yield from operand.nodes()

    def check_scores_weights(self) -> "Metric":
        """Return this metric if it can rank the weights of a matrix.

        Raises:
            ValueError: If an operator in it is meaningless on its operands, such as `colsum(X)`,
                or if its score is the same in every row, or for every input of a row, whatever
                the weights.
        """
        if self.problem:
            raise ValueError(self.problem)
        return self

    def score(self, **leaves: Tensor | None) -> Tensor:
        """Score every weight of one matrix; low scores are pruned.

        Args:
            leaves: Values by leaf, of the shapes given in `pruning.statistics`; W as absolute
                weights. Each is cast to fp32. Leaves that the metric does not name may be None or
                left out.

        Returns:
            Scores in fp32, (out_features, in_features) if `problem` is empty, else possibly of
            size 1 along a side. They may be non-finite: the masks refuse such scores.

        Raises:
            ValueError: If a leaf that the metric names is None or left out.
        """
        known: dict[Metric, Tensor] = {}
        device = torch.device("cpu")
        for leaf in sorted(self.leaves):
            tensor = leaves.get(leaf)
            if tensor is None:
                raise ValueError(f"metric '{self.text}' uses {leaf}, and {leaf} is None: pass it")
            known[Metric(leaf)] = tensor.to(torch.float32)
            device = tensor.device
        return self.evaluate(known, device)

    def evaluate(self, known: dict["Metric", Tensor], device: torch.device) -> Tensor:
        """Return the scores, given its leaves' values; what is computed is added to `known`."""
        if self not in known:
            if self.is_constant:
                # Two dimensions, as every operator expects.
                known[self] = torch.full((1, 1), self.value, dtype=torch.float32, device=device)
            else:
                operands = [operand.evaluate(known, device) for operand in self.operands]
                operator = OPERATORS[self.name]
                unsigned = operator.unsigned if self.operands[-1].never_negative else None
                known[self] = (unsigned or operator.function)(*operands)
        return known[self]

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.operands))

    def __hash__(self) -> int:
        # Cached at every node: `score` looks subtrees up by value.
        return self._hash

    def __reduce__(self) -> tuple[Callable[[str], "Metric"], tuple[str]]:
        """Travel to another process as text, without the cached values."""
        return Metric.parse, (self.text,)


@lru_cache(1 << 15)
def interned(name: str, operands: tuple[Metric, ...] = ()) -> Metric:
    """Return the metric; equal ones are one object, so that what follows from it is found once."""
    return Metric(name, operands)


@dataclass(frozen=True)
class Criterion:
    """A metric and the comparison group that it is meant for: what decides which weights go.

    Attributes:
        metric: Scores every weight.
        group: One of `pruning.masks.GROUPS`: which weights compete with one another. An n:m
            pattern has its own groups.
    """

    metric: Metric
    group: str

    @staticmethod
    def parse(text: str, group: str) -> "Criterion":
        """Read a criterion from its metric's text and its group.

        Raises:
            ValueError: If the group is unknown, and as `Metric.parse` and `check_scores_weights`.
        """
        if group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r:.40}")
        return Criterion(Metric.parse(text).check_scores_weights(), group)

    @property
    def text(self) -> str:
        """The metric's text, without the group."""
        return self.metric.text

    def __str__(self) -> str:
        return f"{self.group}:{self.metric.text}"
