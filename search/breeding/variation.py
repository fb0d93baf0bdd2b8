"""The breeder: seeds, random trees, crossover, two mutations, tuning, and limits.

DEAP draws from the module `random` and takes no generator, so call everything here inside
`seeded`.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TypeVar

from deap import gp

from prunevolve.configs.schema import MAX_TREE_DEPTH, Search
from prunevolve.pruning.metric import Criterion, Metric, interned
from prunevolve.pruning.operators import NUMBER, OPERATORS
from prunevolve.pruning.parse import existing, read_metric
from prunevolve.search.breeding.primitives import (
    draw_factor,
    fill_in_numbers,
    primitive_set,
    size_of,
    to_metric,
    to_tree,
)
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.tuning import (
    DRAWN,
    FACTORS,
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

Mutation = Callable[[gp.PrimitiveTree, gp.PrimitiveSet], gp.PrimitiveTree]

TRIES = 100
"""Draws before variation gives up. The limits reject one random tree in five with the release's
primitives and five in six with the extended ones, so this is hardly ever reached."""

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

    @cached_property
    def primitives(self) -> gp.PrimitiveSet:
        """DEAP's primitive set."""
        return primitive_set(self.search.primitives)

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
        genes = genes_of(start, self._added, self.comparable and start.is_comparable)
        generation, is_mean = place_of(index, tuning, search.lag)

        def child(moved: Numbers) -> Candidate:
            criterion = simplify(Criterion(genes.make(moved), self.group))
            return Candidate(index, criterion, (tuning.start.index,), tuned=True)

        if is_mean:
            return [child(mean_of(genes, tuning, search.lag))]
        drawn = (draw(genes, tuning, search.lag, search.seed, index, i) for i in range(DRAWN))
        part = (generation % PARTS, PARTS)
        return [replace(child(z), numbers=tuple(z.tolist()), part=part) for z in drawn]

    @cached_property
    def _added(self) -> tuple[Metric, ...]:
        """The factors of tunings that matter to the comparison group."""
        if self.group == "row":
            return tuple(factor for factor in FACTORS if factor.shape.by_column)
        return tuple(x for x in FACTORS if self.group == "model" or x.shape != NUMBER)

    def _child(self, index: int, state: State) -> Candidate:
        """Make a child of two members, or a random tree where there are none yet."""
        if index >= self.search.population and state.population:
            first, second = choose_parents(state.population, self.search.parents)
            metric = child_of(first.criterion.metric, second.criterion.metric, self)
            child = simplify(Criterion(metric, self.group))
            if child not in (first.criterion, second.criterion):
                return Candidate(index, child, (first.index, second.index))
        return Candidate(index, simplify(Criterion(random_metric(self), self.group)))


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


def random_metric(breeder: Breeder) -> Metric:
    """Draw a ramped half-and-half tree (Koza, 1992): of random depth, full or grown."""
    grow = partial(gp.genHalfAndHalf, breeder.primitives, *breeder.search.initial_depth)
    metric = _first_allowed(breeder, lambda: gp.PrimitiveTree(grow()))
    return metric or Metric.parse("mul(W, G)" if breeder.comparable else "W")


@lru_cache(1 << 15)
def with_means(metric: Metric) -> Metric:
    """Return a metric with a mean in place of each sum and norm, which add a unit of size."""
    if not metric.operands:
        return metric
    name = OPERATORS[metric.name].twin or metric.name
    return interned(name, tuple(map(with_means, metric.operands)))


def child_of(first: Metric, second: Metric, breeder: Breeder) -> Metric:
    """Make a child by crossover and mutation, each with its probability.

    Returns a child within the limits that is not the first parent, or that parent if `TRIES` draws
    find none. The parents are unchanged.
    """

    def vary() -> gp.PrimitiveTree:
        tree = to_tree(first, breeder.primitives)
        if random.random() < breeder.search.crossover:
            # Only one of the two children is kept: the search breeds one at a time.
            tree, _ = gp.cxOnePoint(tree, to_tree(second, breeder.primitives))
        if random.random() < breeder.search.mutation:
            tree = _mutation_for(breeder)(tree, breeder.primitives)
        return tree

    return _first_allowed(breeder, vary, known=first) or first


def _mutation_for(breeder: Breeder) -> Mutation:
    """Draw a mutation: one of those that the config names, by weight."""
    names = [name for name in MUTATIONS if name in breeder.search.mutations]
    weights = [MUTATIONS[name][1] for name in names]
    return MUTATIONS[random.choices(names, weights)[0]][0]


def _mutate_node(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Point mutation: one node becomes another of the same arity."""
    return gp.mutNodeReplacement(tree, primitives)[0]


def _mutate_factor(tree: gp.PrimitiveTree, primitives: gp.PrimitiveSet) -> gp.PrimitiveTree:
    """Factor mutation: the tree, or a subtree, is multiplied or divided by a drawn one.

    Good pruning metrics are mostly products of the worth of a weight, its input and its row.
    """
    index = 0 if random.random() < 0.5 else random.randrange(len(tree))
    place = tree.searchSubtree(index)
    operator = random.choice([name for name in ("mul", "quot") if name in primitives.mapping])
    factor = to_tree(draw_factor(primitives), primitives)
    tree[place] = [primitives.mapping[operator], *tree[place], *factor]
    return tree


MUTATIONS: dict[str, tuple[Mutation, int]] = {
    "node": (_mutate_node, 1),
    "factor": (_mutate_factor, 4),
}
"""The mutations by name, with the relative frequency of each."""


def _first_allowed(
    breeder: Breeder, draw: Callable[[], gp.PrimitiveTree], known: Metric | None = None
) -> Metric | None:
    """Return the first drawn metric within the limits that is not a known one; None if there is
    none in `TRIES` draws.
    """
    # A tuned metric is larger than those bred, and would have no children.
    limit = max(breeder.search.max_size, known.size if known else 0)
    for _ in range(TRIES):
        tree = fill_in_numbers(draw(), breeder.primitives)
        if size_of(tree) > limit:  # most of them, where a parent is as large as a child can be
            continue
        metric = with_means(to_metric(tree)) if breeder.comparable else to_metric(tree)
        shallow = metric.depth <= MAX_TREE_DEPTH
        units_fit = metric.is_comparable or not breeder.comparable
        if metric != known and shallow and units_fit and not metric.problem:
            return metric
    return None


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
