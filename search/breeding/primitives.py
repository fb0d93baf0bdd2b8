"""The DEAP primitive set, built from our tables; trees, metrics, and the factors of mutations.

Numbers and factors are drawn from the module `random`, as DEAP draws; see
`search.breeding.variation.seeded`.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

from deap import gp

from prunevolve.pruning.metric import MAGNITUDES, Metric, interned
from prunevolve.pruning.operators import (
    MATRIX,
    NUMBER,
    OPERATORS,
    POWER,
    SETS,
    SETS_WITH_NUMBERS,
)
from prunevolve.pruning.statistics import TERMINAL_SETS, TERMINALS
from prunevolve.search.breeding.simplify import powered

BLANK = "number"
"""The terminal that stands for a number yet to be drawn; it never occurs in a metric."""

LOWEST, HIGHEST, NEGATIVE = 1e-3, 1e3, 0.1
"""Magnitudes between which numbers are drawn, uniformly in their logarithm, and the share of them
that are negative."""

EXPONENTS = (0.25, 0.5, 1.5, 2.0)
"""Powers that make more or less of a factor."""

STRENGTHS = (0.1, 0.2, 0.3, 0.5, 1.0)
"""Numbers that a signed factor, of root mean square 1, is multiplied by in its exponential."""

_DEPTH = Metric("D")
"""0 in the first block, so that a power of it would prune or keep all of that."""

REDUCERS = ("rowmean", "rowmax", "rownorm", "colmean", "colmax", "colnorm")
"""Operators that leave one side of a matrix; a sum is a mean, up to a factor for the layer."""


def primitive_set(name: str) -> gp.PrimitiveSet:
    """Return DEAP's `PrimitiveSet` for an operator set in `pruning.operators.SETS`.

    In sets with numbers one terminal, `BLANK`, stands for all of them: DEAP's ephemeral constants
    are classes that live as long as the process, so `fill_in_numbers` draws numbers instead.
    """
    primitives = gp.PrimitiveSet("metric", 0)
    for operator_name, operator in SETS[name].items():
        primitives.addPrimitive(operator.function, operator.arity, name=operator_name)
    for terminal in TERMINAL_SETS[name]:
        primitives.addTerminal(None, name=terminal)
        if name in SETS_WITH_NUMBERS:
            # Most terminals are vectors or scalars, so those that vary along more axes weigh more.
            axes = TERMINALS[terminal].shape.by_row + TERMINALS[terminal].shape.by_column
            terminals = primitives.terminals[primitives.ret]
            terminals.extend([primitives.mapping[terminal]] * axes)
    if name in SETS_WITH_NUMBERS:
        primitives.addTerminal(None, name=BLANK)
    return primitives


def to_tree(metric: Metric, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Return a metric as a DEAP tree: its nodes in prefix order. No text is evaluated.

    The metric may contain operators, terminals and numbers outside the set, as a seed can.
    """
    return gp.PrimitiveTree(_nodes_of(metric, primitives))


@lru_cache(1 << 10)  # a parent is varied again and again, until a child is within the limits
def _nodes_of(metric: Metric, primitives: gp.PrimitiveSet) -> Sequence[gp.Primitive | gp.Terminal]:
    return tuple([node_named(node.name, primitives) for node in metric.nodes()])


def to_metric(tree: gp.PrimitiveTree) -> Metric:
    """Return a DEAP tree as a metric, node for node."""
    return _metric_of(tuple([node.name for node in tree]))


@lru_cache(1 << 15)  # the same factors are drawn again and again
def _metric_of(names: tuple[str, ...]) -> Metric:
    operands: list[Metric] = []
    for name in reversed(names):
        arity = OPERATORS[name].arity if name in OPERATORS else 0
        operands.append(interned(name, tuple([operands.pop() for _ in range(arity)])))
    return operands.pop()


def size_of(tree: gp.PrimitiveTree) -> int:
    """Return the size of the metric that a tree is, if it is one: exponents do not count."""
    return sum([node.name != POWER for node in tree])


def fill_in_numbers(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Replace each `BLANK` of a tree by a random three-digit number, in place; return the tree."""
    for index, node in enumerate(tree):
        if node.name == BLANK:
            magnitude = math.exp(random.uniform(math.log(LOWEST), math.log(HIGHEST)))
            sign = -1 if random.random() < NEGATIVE else 1
            tree[index] = number_node(sign * magnitude, primitives)
    return tree


def number_node(value: float, primitives: gp.PrimitiveSet) -> gp.Terminal:
    """Return the terminal for a number, rounded to three digits and clamped to `MAGNITUDES`."""
    smallest, largest = MAGNITUDES
    magnitude = min(max(abs(value), smallest), largest) if value else 0.0
    rounded = float(f"{math.copysign(magnitude, value):.3g}")
    return node_named(Metric.constant(rounded).text, primitives)


def node_named(name: str, primitives: gp.PrimitiveSet) -> gp.Primitive | gp.Terminal:
    """Return the node for an operator, a terminal or a number, in the set or not."""
    if name in primitives.mapping:
        return primitives.mapping[name]
    if name in OPERATORS:
        return gp.Primitive(name, [primitives.ret] * OPERATORS[name].arity, primitives.ret)
    return gp.Terminal(name, True, primitives.ret)


# Factors that a mutation adds: good metrics are products of the worth of weight, input and row


def draw_factor(primitives: gp.PrimitiveSet) -> Metric:
    """Draw a side, or a matrix relative to the mean of its row or column, as RIA has W.

    Most are bent by a power or an exponential. One that can be negative always is: as it is, it
    would turn the order round. It counts by its root mean square in the layer, so that its strength
    means the same whatever the amount of calibration.
    """
    if "rowmean" in primitives.mapping and random.random() < 0.25:
        terminal = random.choice([x for x in _matrices_of(primitives) if x.never_negative])
        reduced = Metric(random.choice(["rowmean", "colmean"]), (terminal,))
        factor = Metric("quot", (terminal, reduced))
    else:
        factor = _draw_side(primitives)
    if factor == _DEPTH or not factor.never_negative:
        strength = Metric.constant(random.choice(STRENGTHS))
        relative = factor if factor == _DEPTH else Metric("divrms", (factor, factor))
        return Metric("exp", (Metric("mul", (strength, relative)),))
    if random.random() < 0.4:
        return factor
    bends = [x for x in EXPONENTS if x in (0.5, 2) or BLANK in primitives.mapping]
    bend = random.choice([*bends, None])
    return powered(factor, bend) if bend else Metric("exp", (factor,))


def _draw_side(primitives: gp.PrimitiveSet) -> Metric:
    """Draw the worth of an input, a row or a layer: a terminal, or matrices reduced to one side.

    Often relative to its layer. Grown trees of this size hardly ever have these forms.
    """
    named = primitives.mapping
    matrices = _matrices_of(primitives)
    reducers = [name for name in REDUCERS if name in named]
    if reducers and random.random() < 0.5:
        # A vector inside the ratio could mostly be a factor of the whole formula instead.
        first, second = random.sample(matrices, 2)
        drawn = random.choice(
            [first, Metric("mul", (first, second)), Metric("quot", (first, second))]
        )
        if not drawn.never_negative:  # only as a ratio can it be compared
            signed, other = (second, first) if first.never_negative else (first, second)
            drawn = Metric("quot", (signed, other))
        side = Metric(random.choice(reducers), (drawn,))
    else:
        vectors = [name for name in named if name in TERMINALS and Metric(name) not in matrices]
        side = Metric(random.choice(vectors))
    if random.random() < 0.25 and side.never_negative and side.shape != NUMBER:
        return Metric("div", (side, side))
    return side


def _matrices_of(primitives: gp.PrimitiveSet) -> list[Metric]:
    """Return the terminals that differ for each weight."""
    return [
        Metric(n) for n in primitives.mapping if n in TERMINALS and TERMINALS[n].shape == MATRIX
    ]
