"""The DEAP primitive set, made from the tables, and the way between trees and metrics."""

import math
import random

from deap import gp

from pruning.leaves import LEAF_SETS, LEAVES
from pruning.metric import Metric
from pruning.operators import OPERATORS, SETS, SETS_WITH_NUMBERS
from pruning.syntax import MAGNITUDES

BLANK = "number"
"""The terminal that stands for a number yet to be drawn; no metric has it."""

LOWEST, HIGHEST = 1e-3, 1e3
"""Magnitudes between which numbers are drawn, uniformly in their logarithm."""

NEGATIVE = 0.1
"""Share of the drawn numbers that are negative."""


def primitive_set(name: str) -> gp.PrimitiveSet:
    """Return DEAP's `PrimitiveSet` of an operator set in `pruning.operators.SETS`.

    Sets with numbers have one terminal for all, `BLANK`: DEAP's ephemeral constants are classes
    that it keeps for the process, so numbers are drawn here, by `fill_in_numbers`.
    """
    primitives = gp.PrimitiveSet("metric", 0)
    for operator_name, operator in SETS[name].items():
        primitives.addPrimitive(operator.function, operator.arity, name=operator_name)
    for leaf in LEAF_SETS[name]:
        primitives.addTerminal(None, name=leaf)
        if name in SETS_WITH_NUMBERS:
            # Drawn more often the more sides it varies along: most leaves are vectors or numbers.
            sides = LEAVES[leaf].shape.by_row + LEAVES[leaf].shape.by_column
            terminals = primitives.terminals[primitives.ret]
            terminals.extend([primitives.mapping[leaf]] * sides)
    if name in SETS_WITH_NUMBERS:
        primitives.addTerminal(None, name=BLANK)
    return primitives


def has_numbers(primitives: gp.PrimitiveSet) -> bool:
    """Tell whether a set draws numbers."""
    return BLANK in primitives.mapping


def to_tree(metric: Metric, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Return a metric as DEAP's tree: its nodes in prefix order. No text is evaluated.

    The metric may have operators, leaves and numbers that the set does not draw: a seed can.
    """
    return gp.PrimitiveTree([_node(node.name, primitives) for node in metric.nodes()])


def to_metric(tree: gp.PrimitiveTree) -> Metric:
    """Return DEAP's tree as a metric, node for node."""
    return Metric.parse(str(tree))


def fill_in_numbers(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Put a random number of three digits in each `BLANK` of a tree, in place; return the tree."""
    for index, node in enumerate(tree):
        if node.name == BLANK:
            magnitude = math.exp(random.uniform(math.log(LOWEST), math.log(HIGHEST)))
            sign = -1 if random.random() < NEGATIVE else 1
            tree[index] = number_node(sign * magnitude, primitives)
    return tree


def number_node(value: float, primitives: gp.PrimitiveSet) -> gp.Terminal:
    """Return the terminal of a number, rounded to three digits and kept within the language's."""
    smallest, largest = MAGNITUDES
    magnitude = min(max(abs(value), smallest), largest) if value else 0.0
    rounded = float(f"{math.copysign(magnitude, value):.3g}")
    return _node(Metric.constant(rounded).text, primitives)


def is_number(node: gp.Primitive | gp.Terminal) -> bool:
    """Tell whether a tree's node is a number."""
    return node.arity == 0 and node.name not in LEAVES and node.name != BLANK


def _node(name: str, primitives: gp.PrimitiveSet) -> gp.Primitive | gp.Terminal:
    if name in primitives.mapping:
        return primitives.mapping[name]
    if name in OPERATORS:
        return gp.Primitive(name, [primitives.ret] * OPERATORS[name].arity, primitives.ret)
    return gp.Terminal(name, True, primitives.ret)
