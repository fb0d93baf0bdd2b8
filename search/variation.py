"""Variation: ramped random trees, subtree crossover, four mutations, and the limits they obey.

DEAP draws from the module `random` and takes no generator, so everything here is to be called
inside `seeded`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from deap import gp

from pruning.metric import Metric
from search.primitives import to_metric, to_tree

TRIES = 30
"""Draws before variation gives up; the limits reject a small share, so it is hardly ever met."""


@dataclass(frozen=True)
class Variation:
    """How children are made.

    Attributes:
        primitives: DEAP's primitive set.
        min_initial_depth: Of random trees, root at 0.
        max_initial_depth: Of random trees.
        max_depth: Of every tree.
        max_size: Nodes of every tree.
        crossover: Probability of subtree crossover.
        mutation: Probability of one mutation, after crossover.
        mutations: Relative weights of `node`, `subtree`, `hoist` and `insert`.
    """

    primitives: Any
    min_initial_depth: int
    max_initial_depth: int
    max_depth: int
    max_size: int
    crossover: float
    mutation: float
    mutations: dict[str, float]

    def allows(self, metric: Metric) -> bool:
        """Tell whether a tree is within the limits and can rank the weights of a matrix."""
        fits = metric.depth <= self.max_depth and metric.size <= self.max_size
        return fits and not metric.problem


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the module `random` from a key, and put its state back at the end."""
    before = random.getstate()
    random.seed("/".join(map(str, key)))
    try:
        yield
    finally:
        random.setstate(before)


def random_metric(variation: Variation) -> Metric:
    """Draw a tree by ramped half-and-half (Koza, 1992): random depth, full or grown."""
    draw = partial(
        gp.genHalfAndHalf,
        variation.primitives,
        variation.min_initial_depth,
        variation.max_initial_depth,
    )
    metric = _first_allowed(variation, lambda: gp.PrimitiveTree(draw()))
    return metric or Metric("W")


def child_of(first: Metric, second: Metric, variation: Variation) -> Metric:
    """Make a child by subtree crossover and mutation, each with its probability.

    Returns a child within the limits; the parents are unchanged. If none is found in `TRIES`
    draws, the first parent itself.
    """
    metric = _first_allowed(variation, lambda: _vary(first, second, variation))
    return metric or first


def _vary(first: Metric, second: Metric, variation: Variation) -> Any:
    tree = to_tree(first, variation.primitives)
    if random.random() < variation.crossover:
        # Of the two children one is kept: the search breeds one at a time.
        tree, _ = gp.cxOnePoint(tree, to_tree(second, variation.primitives))
    if random.random() < variation.mutation:
        names = list(variation.mutations)
        weights = [variation.mutations[name] for name in names]
        if any(weights):
            chosen = random.choices(names, weights)[0]
            tree = MUTATIONS[chosen](tree, variation.primitives)
    return tree


def _mutate_node(tree: Any, primitives: Any) -> Any:
    """Point mutation: one node becomes another of the same arity."""
    return gp.mutNodeReplacement(tree, primitives)[0]


def _mutate_subtree(tree: Any, primitives: Any) -> Any:
    """Subtree mutation: one subtree becomes a new random one of depth 0 to 2."""
    return gp.mutUniform(tree, partial(_grow, primitives), primitives)[0]


def _mutate_hoist(tree: Any, primitives: Any) -> Any:
    """Hoist mutation: one subtree becomes one of its own operands, so the tree shrinks."""
    return gp.mutShrink(tree)[0]


def _mutate_insert(tree: Any, primitives: Any) -> Any:
    """Insert mutation: a new operator is put above one subtree, its other operands leaves."""
    return gp.mutInsert(tree, primitives)[0]


MUTATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "node": _mutate_node,
    "subtree": _mutate_subtree,
    "hoist": _mutate_hoist,
    "insert": _mutate_insert,
}


def _grow(primitives: Any, pset: Any, type_: Any) -> list[Any]:
    return gp.genGrow(primitives, 0, 2, type_)


def _first_allowed(variation: Variation, draw: Callable[[], Any]) -> Metric | None:
    for _ in range(TRIES):
        tree = draw()
        # Checked before the text is read: crossover can nest deeper than the language allows.
        if tree.height <= variation.max_depth and len(tree) <= variation.max_size:
            metric = to_metric(tree)
            if variation.allows(metric):
                return metric
    return None


def choose_parents(
    population: Sequence[Any], pool: float, best: int, rank: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Draw a random share of the population and pick two parents from the best of it.

    This is the selection of Pruner-Zero (Dong et al., 2024, arXiv:2406.02924, Algorithm 1): the
    draw keeps mediocre members in play, the cut keeps the pressure.
    """
    drawn = random.sample(population, max(2, round(len(population) * pool)))
    first, second = random.sample(sorted(drawn, key=rank)[:best], 2)
    return first, second
