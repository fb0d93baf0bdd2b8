"""The loop: steady state with a fixed lag. It knows nothing about devices, files or Ray.

Child i is bred from the population after outcomes 0 .. i - lag - 1 are committed, with a generator
seeded by (seed, i), and outcomes are committed in order of i, whenever they arrive. So the records
are the same for any number of workers, however they race, and an interrupted run continues by
replaying its records.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from prunevolve.configs.schema import Search
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import SCHEMA
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.breeding.tuning import Tuning
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.fingerprint import Fingerprints
from prunevolve.search.records import Candidate, Outcome, Record
from prunevolve.search.surrogate import Surrogate

LEEWAY = 1.5  # highest fitness that may fill a free place, as a multiple of the best's
FINALISTS = 5  # metrics that are measured on the selection text, from which the winner is chosen
Near = Callable[[Criterion, Criterion], bool]  # whether two criteria make nearly the same mask


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order."""

    committed: int = 0
    population: tuple[Record, ...] = ()  # the fittest candidates, best first
    hall_of_fame: tuple[Record, ...] = ()  # the fittest of each size, by ascending size
    tuning: Tuning = field(default_factory=Tuning)

    def commit(self, record: Record, search: Search, near: Near) -> "State":
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

    def with_limits(self, candidate: Candidate, search: Search, near: Near) -> Candidate:
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
            records = journal[: content["committed"]]
            population, hall_of_fame = (
                tuple(records[index] for index in content[key])
                for key in ("population", "hall_of_fame")
            )
            start = None if content["tuning"] is None else records[content["tuning"]]
            tuning = Tuning(start, content["tuning_from"], (), tuple(content["tuned"]))
        except (LookupError, TypeError) as error:
            raise ValueError(f"it is damaged or from another version: {error!r}") from error
        fits = len(records) == content["committed"] and hall_of_fame == best_of_each_size(records)
        if content["schema"] != SCHEMA or not fits:
            raise ValueError("it does not fit the journal")
        children = tuple(filter(tuning.owns, records))
        return State(len(records), population, hall_of_fame, replace(tuning, children=children))


def best_of_each_size(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the fittest evaluated record of each size, by ascending size."""
    best: dict[int, Record] = {}
    for record in records:
        if record.fitness is not None:
            best[record.size] = min(best.get(record.size, record), record, key=lambda r: r.rank)
    return tuple(best[size] for size in sorted(best))


class Evolution:
    """A search with an ask-and-tell interface: `ask` for candidates, `tell` their outcomes."""

    def __init__(
        self,
        breeder: Breeder,
        weights: Sequence[float],  # of each task in the fitness; they add up to 1
        fingerprints: Fingerprints,
        start: State,  # early enough to breed every child that is not among the records
        records: Iterable[Record] = (),  # all that were committed before, in order
    ) -> None:
        self.breeder, self.search = breeder, breeder.search
        self.fingerprints = fingerprints
        self._firsts: dict[str, int] = {}  # the first index of each text and fingerprint
        self._surrogate = Surrogate(fingerprints.sketch, weights, self.search.crowding)
        self._states = {start.committed: start}
        self._committed = start.committed
        for record in records:
            self._remember(record.candidate)
            if record.index >= start.committed:
                self._commit(record)
            else:
                self._surrogate.learn(record)
        self._bred = self._committed
        self._waiting: dict[int, Candidate] = {}
        self._arrived: dict[int, Outcome] = {}

    @property
    def state(self) -> State:
        """The state after all committed outcomes."""
        return self._states[self._committed]

    @property
    def resumable(self) -> State:
        """The state `lag` outcomes earlier: the oldest that is needed to breed a missing child."""
        return self._states[max(0, self._committed - self.search.lag)]

    @property
    def done(self) -> bool:
        """Whether all candidates are bred and committed."""
        return self._committed >= self.search.candidates

    def ask(self) -> Iterator[Candidate]:
        """Breed the candidates that the lag allows, lazily, one at a time.

        The caller must `tell` an outcome for each; `decided`, where set, is that outcome.
        """
        search = self.search
        while self._bred < min(search.candidates, self._committed + search.lag + 1):
            state = self._states[max(0, self._bred - search.lag)]
            candidate = state.with_limits(self._propose(state), search, self.near)
            self._remember(candidate)
            self._waiting[self._bred] = candidate
            self._bred += 1
            yield candidate

    def tell(self, index: int, outcome: Outcome) -> list[Record]:
        """Take a candidate's outcome; return the records that it allows to commit, in order."""
        self._arrived[index] = outcome
        records = []
        while self._committed in self._arrived:
            index = self._committed
            records.append(Record(self._waiting.pop(index), self._arrived.pop(index)))
            self._commit(records[-1])
        return records

    def near(self, first: Criterion, second: Criterion) -> bool:
        """Return whether two criteria make nearly the same mask."""
        crowding = self.search.crowding
        return crowding > 0 and self.fingerprints.distance(first, second) < crowding

    def _propose(self, state: State) -> Candidate:
        """Breed a brood, and return the most promising of its new children."""
        children = self.breeder.brood(self._bred, state.population, state.tuning)
        if self.search.brood > 1 and len(children) > 1:
            children = list({str(child.criterion): child for child in children}.values())
            self._surrogate.ask_before(state.committed)
            promises = self._surrogate.predict([child.criterion for child in children])
            ranked = sorted(zip(promises, children, strict=True), key=lambda pair: pair[0])
            children = [child for _, child in ranked]
        decided = (self._decide(child) for child in children)  # a fingerprint takes time
        first = next(decided)
        new = (child for child in chain([first], decided) if not child.decided)
        return next(new, first)

    def _commit(self, record: Record) -> None:
        self._surrogate.learn(record)
        state = self.state.commit(record, self.search, self.near)
        self._committed = state.committed
        self._states[self._committed] = state
        self._states.pop(self._committed - self.search.lag - 1, None)

    def _decide(self, candidate: Candidate) -> Candidate:
        """Add the fingerprint, and the outcome if it needs no evaluation.

        A tuning's sample is always measured: on fewer windows than others, so that neither is a
        duplicate of the other.
        """
        is_sample = bool(candidate.numbers)
        text = str(candidate.criterion)
        if text in self._firsts and not is_sample:
            return replace(candidate, decided=self._duplicate("text", text))
        try:
            fingerprint = self.fingerprints.fingerprint(candidate.criterion)
        except DegenerateScores as error:
            return replace(candidate, decided=Outcome("degenerate", reason=str(error)))
        if is_sample:
            return candidate
        same = self._duplicate("mask", fingerprint) if fingerprint in self._firsts else None
        return replace(candidate, fingerprint=fingerprint, decided=same)

    def _duplicate(self, what: str, key: str) -> Outcome:
        return Outcome("duplicate", reason=f"same {what} as {self._firsts[key]}")

    def _remember(self, candidate: Candidate) -> None:
        if not candidate.numbers:  # see `_decide`
            for key in filter(None, (str(candidate.criterion), candidate.fingerprint)):
                self._firsts.setdefault(key, candidate.index)
