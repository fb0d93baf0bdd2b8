"""The breeder: a candidate's criterion from its index and the population, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from configs.schema import Search
from pruning.criterion import Criterion
from search.breeding.primitives import primitive_set
from search.breeding.simplify import simplify
from search.breeding.variation import Variation, child_of, choose_parents, random_metric, seeded
from search.population import Candidate, State


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
    def _variation(self) -> Variation:
        # Only under `model` do the scores of layers compete.
        comparable = self.group == "model" and self.search.units == "required"
        primitives = primitive_set(self.search.primitives, self.search.without)
        return Variation(self.search, primitives, comparable)

    def brood(self, index: int, state: State) -> Iterator[Candidate]:
        """Make what candidate `index` is chosen from, one at a time; a seed is the only one.

        The search begins with seeds and random trees. A child equal to a parent is replaced by a
        random tree (Dong et al., 2024, arXiv:2406.02924, Algorithm 1).
        """
        if index < len(self.seeds):
            yield Candidate(index, simplify(self.seeds[index]))
            return
        for attempt in range(self.search.brood):
            yield self._child(index, state, attempt)

    def _child(self, index: int, state: State, attempt: int) -> Candidate:
        """Make a child of two members, or a random tree where there are none yet."""
        variation = self._variation
        with seeded(self.search.seed, index, *([attempt] if attempt else [])):
            if index >= self.search.population and state.population:
                first, second = choose_parents(state.population, self.search.parents)
                metric = child_of(first.criterion.metric, second.criterion.metric, variation)
                child = simplify(Criterion(metric, self.group))
                if child not in (first.criterion, second.criterion):
                    return Candidate(index, child, (first.index, second.index))
            return Candidate(index, simplify(Criterion(random_metric(variation), self.group)))
