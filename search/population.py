"""The population and the hall of fame, and when the numbers of a member are tuned."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.operators import SETS_WITH_NUMBERS
from prunevolve.pruning.parse import SCHEMA
from prunevolve.search.records import Candidate, Record

UNTUNED = 3
"""Populations' worth of candidates before the first tuning, as what is tuned should be good; seeds
are good enough at once."""

PATIENCE = 2
"""Means in a row, none of which is the best candidate so far, that end a tuning."""

LEEWAY = 1.5
"""Highest fitness that may fill a free place, as a multiple of the best's."""

FINALISTS = 8
"""Metrics that are measured on the selection text, from which the winner is chosen."""

Near = Callable[[Criterion, Criterion], bool]
"""Whether two criteria make nearly the same mask."""


def never(criterion: Criterion, other: Criterion) -> bool:
    """Tell any two masks apart."""
    return False


@dataclass(frozen=True)
class Tuning:
    """The numbers of one metric, as they are being moved: see `search.breeding.tuning`.

    Attributes:
        start: The candidate whose numbers they are.
        first: Index from which on its children are bred.
        children: Its samples, and the means of their distribution, committed so far, in order.
    """

    start: Record
    first: int
    children: tuple[Record, ...] = ()

    def add(self, record: Record) -> "Tuning":
        """Return the tuning with one more child, if the record is one."""
        is_child = record.candidate.tuned and record.candidate.parents == (self.start.index,)
        return replace(self, children=(*self.children, record)) if is_child else self

    def lags_behind(self, best: float) -> bool:
        """Whether its last means are all worse than the best candidate so far."""
        means = [record.loss for record in self.children if not record.candidate.numbers]
        return len(means) >= PATIENCE and min(means[-PATIENCE:]) > best


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order.

    Attributes:
        committed: Number of committed outcomes.
        population: The evaluated candidates that survive, best first.
        hall_of_fame: The best of each size so far, by ascending size.
        tuning: The metric whose numbers are being tuned, if any.
        tuned: Indices of those that were.
    """

    committed: int = 0
    population: tuple[Record, ...] = ()
    hall_of_fame: tuple[Record, ...] = ()
    tuning: Tuning | None = None
    tuned: tuple[int, ...] = ()

    def commit(self, record: Record, search: Search, near: Near = never) -> "State":
        """Return the state after one more outcome; beyond its size, the population's worst goes.

        Only the fitter of two that are near is a member, so that a population never holds many
        copies of one mask.
        """
        assert record.index == self.committed, (record.index, self.committed)
        population, hall_of_fame = self.population, self.hall_of_fame
        if record.fitness is not None:
            hall_of_fame = best_of_each_size((*hall_of_fame, record))
            neighbours = [m for m in population if near(record.criterion, m.criterion)]
            if all(record.standing < member.standing for member in neighbours):
                others = [member for member in population if member not in neighbours]
                ranked = sorted((*others, record), key=lambda member: member.standing)
                population = tuple(ranked[: search.population])
        now = State(self.committed + 1, population, hall_of_fame, self.tuning, self.tuned)
        return now._tune(record, search)

    def _tune(self, record: Record, search: Search) -> "State":
        """Take a child of a tuning; end one that is done, and begin that of the best."""
        tuning, tuned = self.tuning, self.tuned
        if tuning:
            tuning = tuning.add(record)
        if tuning and self.best and tuning.lags_behind(self.best.rank[0]):
            tuned, tuning = (*tuned, tuning.start.index), None
        begun = self.committed >= (len(search.seeds) or UNTUNED * search.population)
        begun &= search.primitives in SETS_WITH_NUMBERS
        if begun and not tuning:
            new = (member for member in self.population if member.index not in tuned)
            best = min(new, key=lambda member: member.rank, default=None)
            tuning = Tuning(best, self.committed + search.lag) if best else None
        return replace(self, tuning=tuning, tuned=tuned)

    @property
    def best(self) -> Record | None:
        """The fittest record so far."""
        return min(self.hall_of_fame, key=lambda record: record.rank, default=None)

    def to_dict(self) -> dict[str, object]:
        """Return the content of a checkpoint; see `read_state`."""
        return {
            "schema": SCHEMA,
            "committed": self.committed,
            "population": [record.to_dict() for record in self.population],
            "hall_of_fame": [record.to_dict() for record in self.hall_of_fame],
            "tuning": [record.to_dict() for record in self.in_tuning],
            "tuning_from": self.tuning.first if self.tuning else 0,
            "tuned": list(self.tuned),
        }

    @property
    def in_tuning(self) -> tuple[Record, ...]:
        """The record whose numbers are being tuned, and its children; none if there is none."""
        return (self.tuning.start, *self.tuning.children) if self.tuning else ()

    def limited(self, candidate: Candidate, search: Search, near: Near = never) -> Candidate:
        """Return a candidate with the limits that it must meet to enter this population.

        A tuning's mean has none: it is near to the best, and a prediction from a few windows is not
        exact enough to tell them apart.
        """
        if candidate.decided or candidate.tuned:
            return candidate
        ranks = [member.rank for member in self.population]
        best = min((rank[0] for rank in ranks), default=math.inf)
        # What is worse than the best baseline, as the first ones are, need not be exact either.
        candidate = replace(candidate, best=min(best, 1.0))
        like = [m.rank for m in self.population if near(candidate.criterion, m.criterion)]
        if not like and len(ranks) < search.population:
            return replace(candidate, enter=LEEWAY * max(0.0, best))
        # It takes the place of those like it, or else of the worst.
        return replace(candidate, enter=min(like, default=max(ranks))[0])

    def finalists(self, count: int | None = FINALISTS) -> list[Record]:
        """Return the fittest of the population and the hall of fame together, best first."""
        members = {record.index: record for record in (*self.population, *self.hall_of_fame)}
        return sorted(members.values(), key=lambda record: record.rank)[:count]


def read_state(path: Path) -> State:
    """Return the state in any run's checkpoint; raise ValueError if it is missing or damaged."""
    try:
        # An older version's has no tuning, and can still give seeds.
        body = {"tuning": [], "tuning_from": 0, "tuned": []} | json.loads(path.read_bytes())
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']!r}, not {SCHEMA}")
        population, hall_of_fame, in_tuning = (
            tuple(Record.from_dict(fields) for fields in body[key])
            for key in ("population", "hall_of_fame", "tuning")
        )
        first = int(body["tuning_from"])
        tuning = Tuning(in_tuning[0], first, in_tuning[1:]) if in_tuning else None
        tuned = tuple(map(int, body["tuned"]))
        return State(int(body["committed"]), population, hall_of_fame, tuning, tuned)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint {path} is missing, damaged or from another version"
        ) from error


def best_of_each_size(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the fittest evaluated record of each size, by ascending size."""
    best: dict[int, Record] = {}
    for record in records:
        if record.fitness is not None:
            best[record.size] = min(best.get(record.size, record), record, key=lambda r: r.rank)
    return tuple(best[size] for size in sorted(best))
