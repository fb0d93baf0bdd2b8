"""Breeding in factors: a metric is a product of powers, and its factors are what is varied.

Good pruning metrics are products of the worth of a weight, its input and its row. Where scores of
several layers compete, a product is a core of bases with units, such as W and G, whose units cancel
together, and factors that have none. A factor comes from a table or is a tree grown by DEAP,
relative to its root mean square in the layer, which takes its units away. So a child is within the
limits as it is made.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from deap import gp

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX, NUMBER
from prunevolve.search.breeding.product import Exponents, factors_of, product_of_powers
from prunevolve.search.breeding.trees import grown, to_tree

MAX_FACTORS = 7
"""Most factors of a bred metric. Longer ones are overfitted: better on the models of the search,
and worse on others (docs/LOG.md: few factors, on models that a search never saw)."""

EXPONENTS = (0.25, 0.5, 1.0, 1.5, 2.0)  # that a factor is drawn with, up to their sign
STRENGTHS = (0.1, 0.2, 0.3, 0.5, 1.0)  # the same for exponentials of a root mean square of 1
GROWN = 0.25  # probability that a drawn factor is grown and not of the table
MUTATIONS = {"add": 3, "remove": 2, "exchange": 2, "vary": 1}  # how often each is drawn

_SIDES = ("rowmean({})", "colmean({})")
_RELATIVE = (
    *(f"quot({x}, {side.format(x)})" for x in "WG" for side in _SIDES),
    *(f"divrms({side.format('mul(W, G)')}, mul(W, G))" for side in _SIDES),
    *(f"exp(divrms({x}, {x}))" for x in (side.format("quot(M, G)") for side in _SIDES)),
    *(f"divrms({x}, {x})" for x in "XVBH"),
)
# A few huge inputs rule a root mean square, and hardly the mean of roots.
_OTHER_SCALES = tuple(Metric.parse(f"quot(sqrt({x}), rowmean(sqrt({x})))") for x in "XVH")
_TABLE = tuple(map(Metric.parse, _RELATIVE))


def factors_for(terminals: Iterable[str], group: str) -> tuple[Metric, ...]:
    """Return the table of factors of some terminals, each relative to its row, column or layer.

    What is the same for all that compete in a comparison group is left out, and so is another scale
    of a layer where layers do not compete.
    """
    table = (*_TABLE, *_OTHER_SCALES) if group == "model" else _TABLE
    allowed = (factor for factor in table if factor.terminals <= set(terminals))
    return tuple(x for x in allowed if x.shape.by_column or group != "row")


@dataclass(frozen=True)
class Products:
    """Draws and varies products of powers: of factors in a table, and of trees of primitives."""

    search: Search
    table: Sequence[Metric]
    primitives: gp.PrimitiveSet
    comparable: bool  # they have no units, since scores of several layers compete
    parents = 1  # of a child

    def random(self) -> Metric:
        """Draw a product of one to four factors, mostly with W and G as its core."""
        product = self.core() if random.random() < 0.75 else {}
        for _ in range(random.randint(1, 4)):
            self._add(product)
        return self._made(product)

    def child(self, parent: Metric) -> Metric:
        """Make a child, which has one factor more, less or another."""
        product = factors_of(parent)
        (kind,) = random.choices(list(MUTATIONS), list(MUTATIONS.values()))
        self._mutate(product, kind)
        return self._made(product)

    def _mutate(self, product: Exponents, kind: str) -> None:
        """Change one factor of a product, in place."""
        free = [base for base in product if self._is_free(base)]
        if not free or (kind == "add" and len(product) < MAX_FACTORS):
            self._add(product)
            return
        base = random.choice(free)
        exponent = product.pop(base)
        varied = self._varied(base) if kind == "vary" else None
        if varied and varied not in product:
            product[varied] = exponent
        elif kind != "remove":
            self._add(product)

    def _add(self, product: Exponents) -> None:
        """Multiply by a drawn factor, in place; one that is there gets the drawn exponent."""
        base = None
        if random.random() < GROWN:
            grow = gp.genHalfAndHalf(self.primitives, *self.search.initial_depth)
            base = self._factor(gp.PrimitiveTree(grow))
        base = base or random.choice(self.table)
        exponent = random.choice(STRENGTHS if base.name == "exp" else EXPONENTS)
        product[base] = exponent * random.choice((1, -1))

    def _made(self, product: Exponents) -> Metric:
        """Return the metric of a product that scores each weight."""
        metric = product_of_powers(product.items())
        if metric.problem:  # nothing was drawn that varies with both sides, or it cancelled
            few = [*factors_of(metric).items()][: MAX_FACTORS - len(self.core())]
            metric = product_of_powers((self.core() | dict(few)).items())
        return metric

    def core(self) -> Exponents:
        """Return a core: SNIP's, W times G, or W if there is no G or nothing has to cancel."""
        if not self.comparable:
            return {Metric("W"): 1.0}
        if "G" in self.primitives.mapping:
            return {Metric("W"): 1.0, Metric("G"): 1.0}
        return {next(base for base in self.table if base.shape == MATRIX): 1.0}

    def _is_free(self, base: Metric) -> bool:
        """Whether a factor can go alone: it has no units, or they do not matter."""
        return base.is_comparable or not self.comparable

    def _varied(self, base: Metric) -> Metric | None:
        """Return a factor with a grown subtree in its tree; None if that is none."""
        match base:
            case Metric("exp", (Metric("divrms", (inner, _)),)) | Metric("divrms", (inner, _)):
                base = inner
        grow = partial(gp.genHalfAndHalf, min_=0, max_=1)
        (tree,) = gp.mutUniform(to_tree(base, self.primitives), grow, self.primitives)
        return self._factor(tree)

    def _factor(self, tree: gp.PrimitiveTree) -> Metric | None:
        """Return what a tree is as a factor: relative, and never negative; None if it is none."""
        metric = grown(tree, self.comparable)
        if metric.mistyped or metric.shape == NUMBER or (self.comparable and not metric.units):
            return None
        relative = Metric("divrms", (metric, metric))
        return relative if metric.never_negative else Metric("exp", (relative,))
