"""Variation: random trees and products, two crossovers, six mutations, and their limits.

DEAP draws from the module `random` and takes no generator, so call everything here inside
`seeded`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from deap import gp

from pruning.metric import Metric
from pruning.operators import OPERATORS
from search.breeding.primitives import (
    fill_in_numbers,
    has_numbers,
    is_number,
    number_node,
    to_metric,
    to_tree,
)
from search.breeding.products import draw_factor, draw_operator, draw_product, exchange_factors

Member = TypeVar("Member")
Rank = tuple[float, ...]
"""A sort key: the better, the smaller."""

TRIES = 100
"""Draws before variation gives up. The limits reject one random tree in five with the release's
primitives and five in six with the extended ones, so this is hardly ever reached."""

FACTORS = {0.5: 3, 1 / 1.2: 3, 1.2: 3, 2.0: 3, -1.0: 1}
"""Factors that tune a number, with relative weights: few, so that the same numbers recur."""


@dataclass(frozen=True)
class Variation:
    """How children are made.

    Attributes:
        primitives: DEAP's primitive set.
        min_initial_depth: Lowest depth of a random tree; the root has depth 0.
        max_initial_depth: Highest depth of a random tree.
        products: Probability that a random tree is a product of leaves and reduced matrices,
            whatever its depth, and not grown from all primitives.
        max_depth: Highest depth of any tree.
        max_size: Most nodes of any tree.
        crossover: Probability of crossover.
        exchange: Share of crossovers that exchange whole factors, and not subtrees.
        mutation: Probability of one mutation, after crossover.
        mutations: Relative weights of the names in `MUTATIONS`; `constant` is ignored in a set
            without numbers.
        comparable: Whether scores of different layers must be comparable: have no units.
    """

    primitives: gp.PrimitiveSet
    min_initial_depth: int
    max_initial_depth: int
    products: float
    max_depth: int
    max_size: int
    crossover: float
    exchange: float
    mutation: float
    mutations: dict[str, float]
    comparable: bool = False

    def allows(self, metric: Metric) -> bool:
        """Return whether a tree is within the limits and can rank the weights of a matrix.

        And, if they must be comparable, those of several layers.
        """
        fits = metric.depth <= self.max_depth and metric.size <= self.max_size
        return fits and not metric.problem and metric.is_comparable >= self.comparable


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the module `random` from a key, and restore its state at the end."""
    state = random.getstate()
    random.seed("/".join(map(str, key)))
    try:
        yield
    finally:
        random.setstate(state)


def random_metric(variation: Variation) -> Metric:
    """Draw a product, or a ramped half-and-half tree (Koza, 1992): random depth, full or grown."""
    primitives = variation.primitives
    depths = variation.min_initial_depth, variation.max_initial_depth
    # Nothing is drawn at 0, so that runs from before there were products can be resumed.
    if variation.products and random.random() < variation.products:
        metric = _first_allowed(variation, lambda: draw_product(primitives))
    else:
        grow = partial(gp.genHalfAndHalf, primitives, *depths)
        metric = _first_allowed(variation, lambda: gp.PrimitiveTree(grow()))
    return metric or Metric.parse("mul(W, G)" if variation.comparable else "W")


def with_means(metric: Metric) -> Metric:
    """Return a metric with a mean in place of each sum and norm, which add a unit of size."""
    if not metric.operands:
        return metric
    name = OPERATORS[metric.name].twin or metric.name
    return Metric(name, tuple(map(with_means, metric.operands)))


def child_of(first: Metric, second: Metric, variation: Variation) -> Metric:
    """Make a child by crossover and mutation, each with its probability.

    Returns a child within the limits, or the first parent itself if `TRIES` draws find none. The
    parents are unchanged.
    """
    metric = _first_allowed(variation, lambda: _vary(first, second, variation))
    return metric or first


def _vary(first: Metric, second: Metric, variation: Variation) -> gp.PrimitiveTree:
    tree = to_tree(first, variation.primitives)
    if random.random() < variation.crossover:
        other = to_tree(second, variation.primitives)
        # Nothing is drawn at 0, so that a search without it breeds as if there were none.
        if variation.exchange and random.random() < variation.exchange:
            tree = exchange_factors(tree, other, variation.primitives)
        else:
            # Only one of the two children is kept: the search breeds one at a time.
            tree, _ = gp.cxOnePoint(tree, other)
    if random.random() < variation.mutation:
        weights = dict(variation.mutations)
        if not has_numbers(variation.primitives):
            weights.pop("constant", None)
        if any(weights.values()):
            chosen = random.choices(list(weights), list(weights.values()))[0]
            tree = MUTATIONS[chosen](tree, variation.primitives)
    return tree


def _mutate_node(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Point mutation: one node becomes another of the same arity."""
    return gp.mutNodeReplacement(tree, primitives)[0]


def _mutate_subtree(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Subtree mutation: one subtree becomes a new random one of depth 0 to 2."""
    return gp.mutUniform(tree, partial(_grow, primitives), primitives)[0]


def _mutate_hoist(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Hoist mutation: one subtree becomes one of its own operands, so the tree shrinks."""
    return gp.mutShrink(tree)[0]


def _mutate_insert(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Insert mutation: a new operator is put above one subtree; its other operands are leaves."""
    return gp.mutInsert(tree, primitives)[0]


def _mutate_factor(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Factor mutation: the tree, or a subtree, is multiplied or divided by a drawn one.

    Good pruning metrics are mostly products of the worth of a weight, its input and its row.
    """
    index = 0 if random.random() < 0.5 else random.randrange(len(tree))
    place = tree.searchSubtree(index)
    tree[place] = [draw_operator(primitives), *tree[place], *draw_factor(primitives)]
    return tree


def _mutate_constant(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Constant mutation: one number is multiplied by one of a few factors.

    The form of the tree alone decides which, so that a parent's tuned children all vary the same
    one. A tree without numbers gets one, as the factor of a subtree.
    """
    numbers = [index for index, node in enumerate(tree) if is_number(node)]
    if not numbers:
        return _multiply(tree, primitives)
    index = numbers[len(tree) % len(numbers)]
    tree[index] = number_node(float(tree[index].name) * _draw_factor(), primitives)
    return tree


def _multiply(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    # Below the root, where a factor can affect the order.
    place = tree.searchSubtree(random.randrange(min(1, len(tree) - 1), len(tree)))
    factor = number_node(_draw_factor(), primitives)
    tree[place] = [primitives.mapping["mul"], factor, *tree[place]]
    return tree


def _draw_factor() -> float:
    return random.choices(list(FACTORS), list(FACTORS.values()))[0]


MUTATIONS: dict[str, Callable[[gp.PrimitiveTree, gp.PrimitiveSet], gp.PrimitiveTree]] = {
    "node": _mutate_node,
    "subtree": _mutate_subtree,
    "hoist": _mutate_hoist,
    "insert": _mutate_insert,
    "factor": _mutate_factor,
    "constant": _mutate_constant,
}


def _grow(
    primitives: gp.PrimitiveSet, pset: gp.PrimitiveSet, type_: type
) -> list[gp.Primitive | gp.Terminal]:
    return list(gp.genGrow(primitives, 0, 2, type_))


def _first_allowed(variation: Variation, draw: Callable[[], gp.PrimitiveTree]) -> Metric | None:
    for _ in range(TRIES):
        tree = fill_in_numbers(draw(), variation.primitives)
        # Checked before the tree is parsed: crossover can nest deeper than the language allows.
        if tree.height <= variation.max_depth and len(tree) <= variation.max_size:
            metric = to_metric(tree)
            if variation.comparable:
                metric = with_means(metric)
            if variation.allows(metric):
                return metric
    return None


def choose_parents(
    population: Sequence[Member], pool: float, best: int, rank: Callable[[Member], Rank]
) -> tuple[Member, Member]:
    """Draw a random share of the population and pick two parents from its best members.

    This is the selection of Pruner-Zero (Dong et al., 2024, arXiv:2406.02924, Algorithm 1): the
    draw keeps mediocre members in play, the cut maintains selection pressure. A lone member is both
    parents.
    """
    if len(population) == 1:
        return population[0], population[0]
    drawn = random.sample(population, max(2, round(len(population) * pool)))
    first, second = random.sample(sorted(drawn, key=rank)[:best], 2)
    return first, second
