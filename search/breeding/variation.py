"""The breeder: seeds, what is drawn or varied from parents, and the children of a tuning.

DEAP draws from the module `random` and takes no generator, so call everything here inside
`seeded`.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.operators import SETS_WITH_NUMBERS
from prunevolve.pruning.parse import existing, read_metric
from prunevolve.pruning.statistics import TERMINAL_SETS
from prunevolve.search.breeding.factors import MOST, Products, factors_for
from prunevolve.search.breeding.product import factors_of
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.trees import Trees, primitive_set
from prunevolve.search.breeding.tuning import (
    DRAWN,
    PARTS,
    Numbers,
    draw,
    genes_of,
    is_tuned,
    mean_of,
    place_of,
)
from prunevolve.search.population import State, Tuning, read_state
from prunevolve.search.records import Candidate

Member = TypeVar("Member")

POOL = 0.5
"""Share of the population that is drawn to choose parents from."""


@dataclass(frozen=True)
class Breeder:
    """Makes candidates.

    Attributes:
        search: The search's settings, from the config.
        group: The comparison group of all candidates.
        seeds: Criteria that come first, in this order.
    """

    search: Search
    group: str
    seeds: tuple[Criterion, ...] = ()

    @property
    def terminals(self) -> tuple[str, ...]:
        """The terminals that candidates are made of."""
        return tuple(self.search.terminals or TERMINAL_SETS[self.search.primitives])

    @cached_property
    def varied(self) -> Products | Trees:
        """What draws and varies metrics: products of factors, or with the release's set trees."""
        search = self.search
        primitives = primitive_set(search.primitives, self.terminals)
        if search.primitives not in SETS_WITH_NUMBERS:
            return Trees(search, primitives, self.comparable)
        depth, odds = search.initial_depth, (search.crossover, search.mutation)
        return Products(self._factors, primitives, depth, self.comparable, *odds)

    @property
    def comparable(self) -> bool:
        """Whether metrics must have no units, since scores of several layers compete."""
        return self.group == "model" and self.search.units == "required"

    def brood(self, index: int, state: State) -> list[Candidate]:
        """Make what candidate `index` is chosen from; a seed is the only one.

        The search begins with seeds and random trees. A child equal to a parent is replaced by a
        random tree (Dong et al., 2024, arXiv:2406.02924, Algorithm 1).
        """
        if index < len(self.seeds):
            return [Candidate(index, simplify(self.seeds[index]))]
        if state.tuning and is_tuned(index):
            return self._tuned(index, state.tuning)
        children = []
        for attempt in range(self.search.brood):
            with seeded(self.search.seed, index, *([attempt] if attempt else [])):
                children.append(self._child(index, state))
        return children

    def _tuned(self, index: int, tuning: Tuning) -> list[Candidate]:
        """Draw samples of a tuning, of which one is measured, or take their distribution's mean."""
        start, search = tuning.start.criterion.metric, self.search
        # One that has as many factors as a bred one may have gets no more: only numbers move.
        added = self._factors if len(factors_of(start)) < MOST else ()
        genes = genes_of(start, added, self.comparable and start.is_comparable)
        generation, is_mean = place_of(index, tuning, search.lag)

        def child(moved: Numbers) -> Candidate:
            metric = genes.make(moved)
            # An exponent that becomes 0 may take what an operator needs, as W of colmax(mul(W, X)).
            criterion = simplify(Criterion(start if metric.problem else metric, self.group))
            return Candidate(index, criterion, (tuning.start.index,), tuned=True)

        if is_mean:
            return [child(mean_of(genes, tuning, search.lag))]
        drawn = (draw(genes, tuning, search.lag, search.seed, index, i) for i in range(DRAWN))
        part = (generation % PARTS, PARTS)
        return [replace(child(z), numbers=tuple(z.tolist()), part=part) for z in drawn]

    @cached_property
    def _factors(self) -> tuple[Metric, ...]:
        """The table of factors, from which some are drawn, and which a tuning adds."""
        return factors_for(self.terminals, self.group)

    def _child(self, index: int, state: State) -> Candidate:
        """Make a child of two members, or a random tree where there are none yet."""
        if index >= self.search.population and state.population:
            first, second = choose_parents(state.population, self.search.parents)
            metric = self.varied.child(first.criterion.metric, second.criterion.metric)
            child = simplify(Criterion(metric, self.group))
            if child not in (first.criterion, second.criterion):
                return Candidate(index, child, (first.index, second.index))
        return Candidate(index, simplify(Criterion(self.varied.random(), self.group)))


def read_seeds(entries: Sequence[str], group: str) -> list[Criterion]:
    """Return the criteria that entries of `search.seeds` stand for, in order, without repeats.

    From another run only texts are taken, never a fitness: its model, sparsity or texts may differ.
    The text of a criterion is an entry that stands for it without any other file.

    Args:
        entries: A metric's name, its text, a metric file or a run folder.
        group: The comparison group that every seed gets.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    read = [criterion for entry in entries for criterion in _criteria_of(entry)]
    seeds = (Criterion(seed.metric.check_scores_weights(), group) for seed in read)
    return list(dict.fromkeys(seeds))


def _criteria_of(entry: str) -> Iterable[Criterion]:
    yield read_metric(entry)  # of a run its best
    path = existing(entry)
    if path and (path / "checkpoint.json").is_file():
        # Some outcomes behind, so that the best may be newer than its members.
        state = read_state(path / "checkpoint.json")
        yield from (record.criterion for record in state.finalists(None))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the module `random` from a key, and restore its state at the end."""
    state = random.getstate()
    random.seed("/".join(map(str, key)))
    try:
        yield
    finally:
        random.setstate(state)


def choose_parents(ranked: Sequence[Member], best: int) -> tuple[Member, Member]:
    """Draw a random half of the population and pick two parents from its best members.

    This is the selection of Pruner-Zero (Dong et al., 2024, arXiv:2406.02924, Algorithm 1): the
    draw keeps mediocre members in play, the cut maintains selection pressure. A lone member is both
    parents.

    Args:
        ranked: The population, best first.
        best: Members of the drawn half that can be parents.
    """
    if len(ranked) == 1:
        return ranked[0], ranked[0]
    places = random.sample(range(len(ranked)), max(2, round(len(ranked) * POOL)))
    first, second = random.sample(sorted(places)[:best], 2)
    return ranked[first], ranked[second]
