"""Breeding of whole trees by DEAP with the release's primitives, which vary node by node."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from deap import gp

from prunevolve.configs.schema import MAX_TREE_DEPTH, Search
from prunevolve.pruning.metric import Metric, interned
from prunevolve.pruning.operators import OPERATORS, SETS, SETS_WITH_NUMBERS
from prunevolve.pruning.statistics import TERMINALS

TRIES = 100  # draws before variation gives up: the limits reject one random tree in five
BLANK = "number"  # the terminal that stands for a number yet to be drawn; no metric has it

LOWEST, HIGHEST, NEGATIVE = 1e-3, 1e3, 0.1
"""Magnitudes between which numbers are drawn, uniformly in their logarithm, and the share of them
that are negative."""


@dataclass(frozen=True)
class Trees:
    """Draws and varies trees of primitives within the limits of a search."""

    search: Search
    primitives: gp.PrimitiveSet
    comparable: bool  # they have no units, since scores of several layers compete
    parents = 2  # of a child

    def random(self) -> Metric:
        """Draw a ramped half-and-half tree (Koza, 1992): of random depth, full or grown."""
        grow = partial(gp.genHalfAndHalf, self.primitives, *self.search.initial_depth)
        metric = self._first_allowed(lambda: gp.PrimitiveTree(grow()))
        return metric or Metric.parse("quot(W, rowmean(W))" if self.comparable else "W")

    def child(self, first: Metric, second: Metric) -> Metric:
        """Make a child by subtree crossover and node mutation, each with its probability.

        It is the first parent if `TRIES` draws find no other within the limits.
        """

        def vary() -> gp.PrimitiveTree:
            tree = to_tree(first, self.primitives)
            if random.random() < self.search.crossover:
                # Only one of the two children is kept: the search breeds one at a time.
                tree, _ = gp.cxOnePoint(tree, to_tree(second, self.primitives))
            if random.random() < self.search.mutation:
                tree = gp.mutNodeReplacement(tree, self.primitives)[0]
            return tree

        return self._first_allowed(vary, parent=first) or first

    def _first_allowed(
        self, draw: Callable[[], gp.PrimitiveTree], parent: Metric | None = None
    ) -> Metric | None:
        """Return the first drawn metric within the limits but the parent; None if none is."""
        for _ in range(TRIES):
            metric = grown(draw(), self.comparable)
            small = metric.size <= self.search.max_size and metric.depth <= MAX_TREE_DEPTH
            units_fit = metric.is_comparable or not self.comparable
            if metric != parent and small and units_fit and not metric.problem:
                return metric
        return None


def grown(tree: gp.PrimitiveTree, comparable: bool) -> Metric:
    """Return a drawn tree as a metric, with drawn numbers for blanks, and with means for sums if it
    must be comparable.
    """
    metric = _metric_of(tuple([_number() if x.name == BLANK else x.name for x in tree]))
    return _with_means(metric) if comparable else metric


def _number() -> str:
    """Draw a number of three digits."""
    magnitude = math.exp(random.uniform(math.log(LOWEST), math.log(HIGHEST)))
    sign = -1 if random.random() < NEGATIVE else 1
    return Metric.constant(float(f"{sign * magnitude:.3g}")).text


@lru_cache(1 << 15)
def _metric_of(names: tuple[str, ...]) -> Metric:
    """Return the metric whose nodes have these names, in prefix order."""
    operands: list[Metric] = []
    for name in reversed(names):
        arity = OPERATORS[name].arity if name in OPERATORS else 0
        operands.append(interned(name, tuple([operands.pop() for _ in range(arity)])))
    return operands.pop()


@lru_cache(1 << 15)
def _with_means(metric: Metric) -> Metric:
    """Return a metric with a mean in place of each sum and norm, which add a unit of size."""
    if not metric.operands:
        return metric
    name = OPERATORS[metric.name].twin or metric.name
    return interned(name, tuple(map(_with_means, metric.operands)))


def primitive_set(name: str, terminals: Sequence[str]) -> gp.PrimitiveSet:
    """Return DEAP's `PrimitiveSet` for an operator set in `pruning.operators.SETS`.

    In sets with numbers one terminal, `BLANK`, stands for all of them: DEAP's ephemeral constants
    are classes that live as long as the process, so `grown` draws numbers instead.
    """
    primitives = gp.PrimitiveSet("metric", 0)
    for operator_name, operator in SETS[name].items():
        primitives.addPrimitive(operator.function, operator.arity, name=operator_name)
    for terminal in terminals:
        primitives.addTerminal(None, name=terminal)
        if name in SETS_WITH_NUMBERS:
            # Most terminals are vectors or scalars, so those that vary along more axes weigh more.
            axes = TERMINALS[terminal].shape.by_row + TERMINALS[terminal].shape.by_column
            drawn = primitives.terminals[primitives.ret]
            drawn.extend([primitives.mapping[terminal]] * axes)
    if name in SETS_WITH_NUMBERS:
        primitives.addTerminal(None, name=BLANK)
    return primitives


def to_tree(metric: Metric, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Return a metric as a DEAP tree, also if it has nodes outside the set, as a seed can."""
    return gp.PrimitiveTree(_nodes_of(metric, primitives))


@lru_cache(1 << 10)  # a parent is varied again and again
def _nodes_of(metric: Metric, primitives: gp.PrimitiveSet) -> Sequence[gp.Primitive | gp.Terminal]:
    return tuple([_node(x.name, primitives) for x in metric.nodes()])


def _node(name: str, primitives: gp.PrimitiveSet) -> gp.Primitive | gp.Terminal:
    if name in primitives.mapping:
        return primitives.mapping[name]
    if name in OPERATORS:
        return gp.Primitive(name, [primitives.ret] * OPERATORS[name].arity, primitives.ret)
    return gp.Terminal(name, True, primitives.ret)
