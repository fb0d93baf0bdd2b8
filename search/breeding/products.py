"""Products: most good pruning metrics are products of the worth of a weight, its input and its row.

Random products, factors that a mutation adds, and the crossover that exchanges factors. They draw
from the module `random`, as DEAP does; see `search.breeding.variation.seeded`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deap import gp

from pruning.leaves import LEAVES
from pruning.metric import Metric
from pruning.operators import MATRIX, NUMBER
from search.breeding.primitives import node_named, to_metric

Nodes = list[gp.Primitive | gp.Terminal]
"""A subtree in prefix order."""

BENDS = ("sqrt", "root4", "sqr", "pow15", "exp")
"""Operators that make more or less of a factor."""

_JOINS = ("mul", "quot")
"""Operators that join the factors of a product."""

REDUCERS = ("rowmean", "rowmax", "rownorm", "colmean", "colmax", "colnorm")
"""Operators that leave one side of a matrix; a sum is a mean, up to a factor for the layer."""


@dataclass(frozen=True)
class _Factor:
    """A factor of a product: a subtree without multiplication or division at its top."""

    nodes: Nodes
    divides: bool

    @property
    def text(self) -> str:
        """What two equal factors have in common."""
        return ("/" if self.divides else "*") + str(gp.PrimitiveTree(self.nodes))


def _factors_of(tree: gp.PrimitiveTree, at: int = 0, divides: bool = False) -> list[_Factor]:
    """Return the factors of the subtree at an index, in order; one if it is no product."""
    if tree[at].name not in _JOINS:
        return [_Factor(tree[tree.searchSubtree(at)], divides)]
    second = tree.searchSubtree(at + 1).stop
    turned = divides != (tree[at].name == "quot")
    return [*_factors_of(tree, at + 1, divides), *_factors_of(tree, second, turned)]


def _product_of(factors: Sequence[_Factor], primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Return the product of factors, one of which multiplies: the first such begins it."""
    begins = next(factor for factor in factors if not factor.divides)
    product = begins.nodes
    for factor in factors:
        if factor is not begins:
            # A seed can have operators that are not in the set.
            join = node_named("quot" if factor.divides else "mul", primitives)
            product = [join, *product, *factor.nodes]
    return gp.PrimitiveTree(product)


def exchange_factors(
    tree: gp.PrimitiveTree, other: gp.PrimitiveTree, primitives: gp.PrimitiveSet
) -> gp.PrimitiveTree:
    """Uniform crossover (Syswerda, 1989) of products: each factor is inherited or not.

    What both parents have, the child has; each other factor with probability one half. A subtree
    that is exchanged at random hardly ever brings one whole factor from one product to another.
    """
    mine, theirs = _factors_of(tree), _factors_of(other)
    left = Counter(factor.text for factor in theirs)
    inherited = []
    for factor in mine:
        both = left[factor.text] > 0
        left[factor.text] -= both
        if both or random.random() < 0.5:
            inherited.append(factor)
    for factor in theirs:
        if left[factor.text] > 0:
            left[factor.text] -= 1
            if random.random() < 0.5:
                inherited.append(factor)
    if all(factor.divides for factor in inherited):
        return tree
    return _product_of(inherited, primitives)


def draw_product(primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Draw a product of two or three factors: a matrix leaf, and others or sides."""
    product = _draw_matrix(primitives)
    for _ in range(random.choice([1, 2])):
        draw = random.choice([_draw_matrix, draw_factor])
        product = [draw_operator(primitives), *product, *draw(primitives)]
    return gp.PrimitiveTree(product)


def draw_operator(primitives: gp.PrimitiveSet) -> gp.Primitive:
    """Draw the operator that joins a factor: multiplication or division."""
    names = [name for name in _JOINS if name in primitives.mapping]
    return primitives.mapping[random.choice(names)]


def _draw_matrix(primitives: gp.PrimitiveSet) -> Nodes:
    """Draw a leaf that differs for each weight, often bent."""
    leaf = primitives.mapping[random.choice(_matrices_of(primitives))]
    return _bent([leaf], primitives)


def draw_factor(primitives: gp.PrimitiveSet) -> Nodes:
    """Draw a side, or a matrix relative to the mean of its row or column, as RIA has W."""
    named = primitives.mapping
    if "rowmean" not in named or random.random() >= 0.25:
        return _draw_side(primitives)
    leaf = random.choice([n for n in _matrices_of(primitives) if not LEAVES[n].signed])
    names = ("quot", leaf, random.choice(["rowmean", "colmean"]), leaf)
    return _bent([named[name] for name in names], primitives)


def _draw_side(primitives: gp.PrimitiveSet) -> Nodes:
    """Draw the worth of an input, a row or a layer: a leaf, or matrices reduced to one side.

    Often relative to its layer, and bent. Grown trees of this size hardly ever have these forms.
    """
    named = primitives.mapping
    matrices = _matrices_of(primitives)
    reducers = [name for name in REDUCERS if name in named]
    if reducers and random.random() < 0.5:
        # Vectors inside would mostly be factors that could as well stand outside.
        first, second = random.sample(matrices, 2)
        drawn = random.choice([[first], ["mul", first, second], ["quot", first, second]])
        for signed, other in ((first, second), (second, first)):
            if signed in drawn and not Metric(signed).never_negative:
                # It will be bent by `exp`, whose operand has to be a ratio to mean anything.
                drawn = ["quot", signed, other]
        side = [named[name] for name in (random.choice(reducers), *drawn)]
    else:
        vectors = [name for name in named if name in LEAVES and name not in matrices]
        side = [named[random.choice(vectors)]]
    if random.random() < 0.25 and to_metric(gp.PrimitiveTree(side)).shape != NUMBER:
        side = [named["div"], *side, *side]
    return _bent(side, primitives)


def _bent(factor: Nodes, primitives: gp.PrimitiveSet) -> Nodes:
    """Return a factor, often bent by a power or an exponential.

    Always by the latter if it can be negative: a negative factor would turn the order round.
    """
    if not to_metric(gp.PrimitiveTree(factor)).never_negative:
        return [primitives.mapping["exp"], *factor]
    bends = [primitives.mapping[name] for name in BENDS if name in primitives.mapping]
    return [random.choice(bends), *factor] if random.random() < 0.6 else factor


def _matrices_of(primitives: gp.PrimitiveSet) -> list[str]:
    """Return the names of the leaves that differ for each weight."""
    return [n for n in primitives.mapping if n in LEAVES and LEAVES[n].shape == MATRIX]
