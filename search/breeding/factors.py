"""Factors that a mutation adds: good metrics are products of the worth of weight, input and row.

They are drawn from the module `random`, as DEAP draws; see `search.breeding.variation.seeded`.
"""

import random

from deap import gp

from pruning.leaves import LEAVES
from pruning.metric import Metric
from pruning.operators import MATRIX, NUMBER
from search.breeding.primitives import to_metric

Nodes = list[gp.Primitive | gp.Terminal]
"""A subtree in prefix order."""

BENDS = ("sqrt", "root4", "sqr", "pow15", "exp")
"""Operators that make more or less of a factor."""

_JOINS = ("mul", "quot")
"""Operators that join the factors of a product."""

REDUCERS = ("rowmean", "rowmax", "rownorm", "colmean", "colmax", "colnorm")
"""Operators that leave one side of a matrix; a sum is a mean, up to a factor for the layer."""


def draw_operator(primitives: gp.PrimitiveSet) -> gp.Primitive:
    """Draw the operator that joins a factor: multiplication or division."""
    names = [name for name in _JOINS if name in primitives.mapping]
    return primitives.mapping[random.choice(names)]


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
        # A vector inside the ratio could mostly be a factor of the whole formula instead.
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
