"""The breeder: a candidate's criterion from its index and the population, and nothing else."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from configs.schema import Search
from pruning.criterion import Criterion
from search.breeding.primitives import primitive_set
from search.breeding.simplify import simplify
from search.breeding.variation import Variation, child_of, choose_parents, random_metric, seeded
from search.population import Candidate, State

_EXPLORES = -1
"""Added to the seed of a candidate's breeding to draw whether it explores."""

EXPLORATION = 0.25
"""Share of candidates that are one mutation away from a member and are not chosen from a brood:
what chooses there knows nothing of masks unlike all that were measured."""


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

    def explores(self, index: int) -> bool:
        """Return whether a candidate is bred alone, by one mutation."""
        if self.search.brood == 1 or index < len(self.seeds):
            return False
        with seeded(self.search.seed, index, _EXPLORES):
            return random.random() < EXPLORATION

    def brood(self, index: int, state: State) -> Iterator[Candidate]:
        """Make what candidate `index` is chosen from, one at a time; a seed is the only one.

        Each population begins with random trees, the first one with seeds before them. A child
        equal to a parent is replaced by a random tree (Dong et al., 2024, arXiv:2406.02924,
        Algorithm 1).
        """
        if index < len(self.seeds):
            yield Candidate(index, simplify(self.seeds[index]))
            return
        variation = self._variation
        if self.explores(index):
            alone = self.search.model_copy(update={"crossover": 0.0, "mutation": 1.0})
            variation = replace(variation, search=alone)
        for attempt in range(self.search.brood):
            yield self._child(index, state, variation, attempt)

    def _child(self, index: int, state: State, variation: Variation, attempt: int) -> Candidate:
        """Make a child of two members, or a random tree where there are none yet."""
        with seeded(self.search.seed, index, *([attempt] if attempt else [])):
            if index >= state.began + self.search.population and state.population:
                first, second = choose_parents(state.population, self.search.parents)
                metric = child_of(first.criterion.metric, second.criterion.metric, variation)
                child = simplify(Criterion(metric, self.group))
                if child not in (first.criterion, second.criterion):
                    return Candidate(index, child, (first.index, second.index))
            return Candidate(index, simplify(Criterion(random_metric(variation), self.group)))
