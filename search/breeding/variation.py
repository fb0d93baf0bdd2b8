"""The breeder: seeds, and what is drawn or varied from parents.

DEAP draws from the module `random` and takes no generator, so call everything here inside
`seeded`.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.operators import SETS_WITH_NUMBERS
from prunevolve.pruning.parse import read_metric
from prunevolve.pruning.statistics import TERMINAL_SETS
from prunevolve.search.breeding.factors import Products, factors_for
from prunevolve.search.breeding.product import product_of_powers
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.trees import Trees, primitive_set
from prunevolve.search.records import Candidate, Record

POOL = 0.5  # share of the population that is drawn to choose parents from


@dataclass(frozen=True)
class Breeder:
    """Makes candidates of one comparison group; seeds come first, in their order."""

    search: Search
    group: str
    seeds: tuple[Criterion, ...] = ()

    @property
    def terminals(self) -> tuple[str, ...]:
        """The terminals that candidates are made of."""
        return tuple(self.search.terminals or TERMINAL_SETS[self.search.primitives])

    @property
    def comparable(self) -> bool:
        """Whether metrics must have no units, since scores of several layers compete."""
        return self.group == "model" and self.search.units == "required"

    @cached_property
    def varied(self) -> Products | Trees:
        """What draws and varies metrics: products of factors, or with the release's set trees."""
        search = self.search
        primitives = primitive_set(search.primitives, self.terminals)
        if not self.descends:
            return Trees(search, primitives, self.comparable)
        return Products(search, self.factors, primitives, self.comparable)

    @cached_property
    def factors(self) -> tuple[Metric, ...]:
        """The table of factors, from which some are drawn, and which a descent adds."""
        return factors_for(self.terminals, self.group)

    @cached_property
    def core(self) -> Metric:
        """The core of random products, from which a search without seeds begins."""
        assert isinstance(self.varied, Products)
        return product_of_powers(self.varied.core().items())

    @property
    def firsts(self) -> tuple[Criterion, ...]:
        """The first candidates: the seeds, or else the core where metrics are products."""
        return self.seeds or ((Criterion(self.core, self.group),) if self.descends else ())

    @property
    def descends(self) -> bool:
        """Whether exponents are numbers that can descend: the release's set has none."""
        return self.search.primitives in SETS_WITH_NUMBERS

    def breed(self, index: int, population: Sequence[Record]) -> Candidate:
        """Make candidate `index`.

        The search begins with seeds and random metrics. A child equal to a parent is replaced by a
        random one (Dong et al., 2024, arXiv:2406.02924, Algorithm 1).
        """
        if index < len(self.firsts):
            return Candidate(index, simplify(self.firsts[index]))
        with seeded(self.search.seed, index):
            return self._child(index, population)

    def _child(self, index: int, population: Sequence[Record]) -> Candidate:
        """Make a child of members, or a random metric where there are none yet."""
        if index >= self.search.population and population:
            parents = choose_parents(population, self.search.parents, self.varied.parents)
            metric = self.varied.child(*(parent.criterion.metric for parent in parents))
            child = simplify(Criterion(metric, self.group))
            if child not in [parent.criterion for parent in parents]:
                return Candidate(index, child, "child", tuple(x.index for x in parents))
        return Candidate(index, simplify(Criterion(self.varied.random(), self.group)), "random")


def read_seeds(entries: Sequence[str], group: str) -> list[Criterion]:
    """Return the criteria that entries of `search.seeds` stand for, in order, without repeats.

    An entry is a metric's name, its text, a metric file or a run folder, which gives its best.
    Raises ValueError if it is none of these, or its metric cannot rank weights.
    """
    metrics = (read_metric(entry).metric.check_scores_weights() for entry in entries)
    return list(dict.fromkeys(Criterion(metric, group) for metric in metrics))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the module `random` from a key, and restore its state at the end."""
    state = random.getstate()
    random.seed("/".join(map(str, key)))
    try:
        yield
    finally:
        random.setstate(state)


def choose_parents(ranked: Sequence[Record], best: int, count: int) -> list[Record]:
    """Draw a random half of the population and pick parents from its `best` members.

    This is the selection of Pruner-Zero (Dong et al., 2024, arXiv:2406.02924, Algorithm 1): the
    draw keeps mediocre members in play, the cut maintains selection pressure. A lone member is all
    parents. `ranked` is the population, best first.
    """
    if len(ranked) == 1:
        return [ranked[0]] * count
    drawn = random.sample(range(len(ranked)), max(2, round(len(ranked) * POOL)))
    return [ranked[i] for i in random.sample(sorted(drawn)[:best], count)]
