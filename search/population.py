"""The population and the hall of fame."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from prunevolve.configs.schema import Search
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import SCHEMA
from prunevolve.search.breeding.tuning import Tuning
from prunevolve.search.records import Candidate, Record

LEEWAY = 1.5
"""Highest fitness that may fill a free place, as a multiple of the best's."""

FINALISTS = 8
"""Metrics that are measured on the selection text, from which the winner is chosen."""


Near = Callable[[Criterion, Criterion], bool]
"""Whether two criteria make nearly the same mask."""


def never(one: Criterion, other: Criterion) -> bool:
    """Tell any two masks apart."""
    return False


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order.

    Attributes:
        population: The fittest candidates, best first.
        hall_of_fame: The fittest of each size, by ascending size.
    """

    committed: int = 0
    population: tuple[Record, ...] = ()
    hall_of_fame: tuple[Record, ...] = ()
    tuning: Tuning = field(default_factory=Tuning)

    def commit(self, record: Record, search: Search, near: Near = never) -> "State":
        """Return the state after one more outcome; beyond its size, the population's worst goes.

        Only the fitter of two that are near is a member, so that a population never holds many
        copies of one mask.
        """
        assert record.index == self.committed, (record.index, self.committed)
        population, hall_of_fame = self.population, self.hall_of_fame
        if record.fitness is not None:
            hall_of_fame = best_of_each_size((*hall_of_fame, record))
            like = [m for m in population if near(record.criterion, m.criterion)]
            if all(record.standing < member.standing for member in like):
                others = [member for member in population if member not in like]
                ranked = sorted((*others, record), key=lambda member: member.standing)
                population = tuple(ranked[: search.population])
        best = min((fittest.rank[0] for fittest in hall_of_fame), default=math.inf)
        tuning = self.tuning.tell(record, population, best, search)
        return State(self.committed + 1, population, hall_of_fame, tuning)

    @property
    def best(self) -> Record | None:
        """The fittest record so far."""
        return min(self.hall_of_fame, key=lambda record: record.rank, default=None)

    def to_checkpoint(self) -> JsonObject:
        """Return the content of a checkpoint, with records by their index in the journal."""
        tuning = self.tuning
        return {
            "schema": SCHEMA,
            "committed": self.committed,
            "population": [member.index for member in self.population],
            "hall_of_fame": [fittest.index for fittest in self.hall_of_fame],
            "tuning": tuning.start and tuning.start.index,
            "tuning_from": tuning.first,
            "tuned": list(tuning.done),
        }

    @staticmethod
    def from_checkpoint(content: JsonObject, journal: Sequence[Record]) -> "State":
        """Return the state in a checkpoint; raise ValueError if it is damaged, or the journal is
        another or shorter.
        """
        try:
            known = journal[: content["committed"]]
            population, hall = (
                tuple(known[index] for index in content[key])
                for key in ("population", "hall_of_fame")
            )
            start = None if content["tuning"] is None else known[content["tuning"]]
            tuning = Tuning(start, content["tuning_from"], (), tuple(content["tuned"]))
        except (LookupError, TypeError) as error:
            raise ValueError(f"it is damaged or from another version: {error!r}") from error
        fits = len(known) == content["committed"] and hall == best_of_each_size(known)
        if content["schema"] != SCHEMA or not fits:
            raise ValueError("it does not fit the journal")
        children = tuple(filter(tuning.owns, known))
        return State(len(known), population, hall, replace(tuning, children=children))

    def with_limits(self, candidate: Candidate, search: Search, near: Near = never) -> Candidate:
        """Return a candidate with the limits that it must meet to enter this population.

        A tuning's mean has none: it is near to the best, and a prediction from a few windows is not
        exact enough to tell them apart.
        """
        if candidate.decided or candidate.tuned:
            return candidate
        fitness = [member.rank[0] for member in self.population]
        best = min(fitness, default=math.inf)
        like = [m.rank[0] for m in self.population if near(candidate.criterion, m.criterion)]
        if like:  # it takes their place
            limit = min(like)
        elif len(fitness) == search.population:
            limit = max(fitness)
        else:
            limit = LEEWAY * max(0.0, best)
        # What is worse than the best baseline, as the first ones are, need not be exact either.
        return replace(candidate, best=min(best, 1.0), limit=limit)

    def finalists(self) -> list[Record]:
        """Return the fittest of the population and the hall of fame together, best first."""
        members = {record.index: record for record in (*self.population, *self.hall_of_fame)}
        return sorted(members.values(), key=lambda record: record.rank)[:FINALISTS]


def best_of_each_size(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the fittest evaluated record of each size, by ascending size."""
    best: dict[int, Record] = {}
    for record in records:
        if record.fitness is not None:
            best[record.size] = min(best.get(record.size, record), record, key=lambda r: r.rank)
    return tuple(best[size] for size in sorted(best))
