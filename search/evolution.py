"""The loop: steady state with a fixed lag. It knows nothing about devices, files or Ray.

Child i is bred from the population after outcomes 0 .. i - lag - 1 are committed, with a generator
seeded by (seed, i), and outcomes are committed in order of i, whenever they arrive. So the records
are the same for any number of workers, however they race, and an interrupted run continues by
replaying its records.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from prunevolve.configs.schema import Search
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import SCHEMA
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.breeding.product import can_descend
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.fingerprint import Fingerprints
from prunevolve.search.records import Candidate, Limits, Outcome, Record

DESCENTS = 8  # one candidate in so many descends
STARTS = 2  # descents that begin from a seed; one may go astray
LEEWAY = 1.5  # highest fitness that may fill a free place, as a multiple of the best's
FINALISTS = 5  # metrics that are measured on the selection text, from which the winner is chosen


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order."""

    committed: int = 0
    population: tuple[Record, ...] = ()  # the fittest candidates, best first
    hall_of_fame: tuple[Record, ...] = ()  # the fittest of each size, by ascending size

    def commit(self, record: Record, search: Search) -> "State":
        """Return the state after one more outcome; beyond its size, the population's worst goes."""
        assert record.index == self.committed, (record.index, self.committed)
        population, hall_of_fame = self.population, self.hall_of_fame
        if record.fitness is not None:
            hall_of_fame = best_of_each_size((*hall_of_fame, record))
            ranked = sorted((*population, record), key=lambda member: member.standing)
            population = tuple(ranked[: search.population])
        return State(self.committed + 1, population, hall_of_fame)

    @property
    def best(self) -> Record | None:
        """The fittest record so far."""
        return min(self.hall_of_fame, key=lambda record: record.rank, default=None)

    def with_limits(self, candidate: Candidate, search: Search) -> Candidate:
        """Return a candidate with the limits that it must meet to enter this population.

        A descent has none: what it costs to measure is little beside its steps.
        """
        if candidate.decided or candidate.origin == "descent":
            return candidate
        fitness = [member.rank[0] for member in self.population]
        best = min(fitness, default=math.inf)
        is_full = len(fitness) == search.population
        entry = max(fitness) if is_full else LEEWAY * max(0.0, best)
        # What is worse than the best baseline, as the first ones are, need not be exact either.
        return replace(candidate, limits=Limits(min(best, 1.0), entry))

    def finalists(self) -> list[Record]:
        """Return the fittest of the population and the hall of fame together, best first."""
        members = {record.index: record for record in (*self.population, *self.hall_of_fame)}
        return sorted(members.values(), key=lambda record: record.rank)[:FINALISTS]

    def to_checkpoint(self) -> JsonObject:
        """Return the content of a checkpoint, with records by their index in the journal."""
        return {
            "schema": SCHEMA,
            "committed": self.committed,
            "population": [member.index for member in self.population],
            "hall_of_fame": [fittest.index for fittest in self.hall_of_fame],
        }

    @staticmethod
    def from_checkpoint(content: JsonObject, journal: Sequence[Record]) -> "State":
        """Return the state in a checkpoint; raise ValueError if it is damaged, or the journal is
        another or shorter.
        """
        try:
            records = journal[: content["committed"]]
            population = tuple(records[index] for index in content["population"])
        except (LookupError, TypeError) as error:
            raise ValueError(f"it is damaged or from another version: {error!r}") from error
        state = State(len(records), population, best_of_each_size(records))
        if state.to_checkpoint() != content:
            raise ValueError("it does not fit the journal")
        return state


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
        fingerprints: Fingerprints,
        start: State,  # early enough to breed every child that is not among the records
        records: Iterable[Record] = (),  # all that were committed before, in order
    ) -> None:
        self.breeder, self.search = breeder, breeder.search
        self.fingerprints = fingerprints
        self._firsts: dict[str, int] = {}  # the first index of each text and fingerprint bred
        self._led_to: dict[str, int] = {}  # the first index of each fingerprint that a descent has
        self._seeds: list[Record] = []  # those that have a fitness
        self._begun: list[int] = []  # for each descent the index of what it began from
        self._states = {start.committed: start}
        self._committed = start.committed
        for record in records:
            self._remember(record.candidate)
            self._commit(record)
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

    @property
    def waits(self) -> bool:
        """Whether candidates are bred and not committed."""
        return self._committed < self._bred

    def ask(self) -> Iterator[Candidate]:
        """Breed the candidates that the lag allows, lazily, one at a time.

        The caller must `tell` an outcome for each; `decided`, where set, is that outcome.
        """
        search = self.search
        while self._bred < min(search.candidates, self._committed + search.lag + 1):
            state = self._states[max(0, self._bred - search.lag)]
            candidate = state.with_limits(self._propose(state), search)
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
            record = Record(self._waiting.pop(index), self._arrived.pop(index))
            records.append(self._marked(record) if record.outcome.tuned else record)
            self._commit(records[-1])
        return records

    def _propose(self, state: State) -> Candidate:
        """Return a descent, or breed a child."""
        is_due = self._bred % DESCENTS == DESCENTS - 1 and self._bred >= len(self.breeder.firsts)
        if is_due and (start := self._start_of(state)):
            return Candidate(self._bred, start.criterion, "descent", (start.index,))
        return self._decide(self.breeder.breed(self._bred, state.population), state)

    def _start_of(self, state: State) -> Record | None:
        """Return what a descent begins from, if anything can descend: the first `STARTS` from the
        fittest seed, the others from the best member from which none began.

        Each draws other windows. One that went astray is not made good by going on from its end.
        """
        if not self.breeder.descends:
            return None
        among = [member for member in state.population if member.index not in self._begun]
        if len(self._begun) < STARTS:
            seeds = [seed for seed in self._seeds if seed.index < state.committed]
            among = [*sorted(seeds, key=lambda seed: seed.rank), *among]
        return next((x for x in among if can_descend(x.criterion.metric)), None)

    def _commit(self, record: Record) -> None:
        """Add a record to the state, unless it is one of those that the search started after."""
        if record.outcome.tuned and record.candidate.fingerprint:
            self._led_to.setdefault(record.candidate.fingerprint, record.index)
        if record.candidate.origin == "seed" and record.fitness is not None:
            self._seeds.append(record)
        if record.index >= self._committed:
            state = self.state.commit(record, self.search)
            self._committed = state.committed
            self._states[self._committed] = state
            self._states.pop(self._committed - self.search.lag - 1, None)

    def _decide(self, candidate: Candidate, state: State) -> Candidate:
        """Add the fingerprint, and the outcome if it needs no evaluation."""
        criterion, index = candidate.criterion, candidate.index
        if (first := self._firsts.get(str(criterion))) is not None:
            return replace(candidate, decided=Outcome("duplicate", reason=f"same text as {first}"))
        fingerprint, decided = self._fingerprinted(criterion, index, state.committed)
        return replace(candidate, fingerprint=fingerprint, decided=decided)

    def _marked(self, record: Record) -> Record:
        """Return what a descent led to with its fingerprint; the mask may be known."""
        index, outcome = record.index, record.outcome
        fingerprint, decided = self._fingerprinted(record.criterion, index, index)
        if decided:
            outcome = replace(outcome, kind=decided.kind, fitness=None, reason=decided.reason)
        return Record(replace(record.candidate, fingerprint=fingerprint), outcome)

    def _fingerprinted(
        self, criterion: Criterion, index: int, committed: int
    ) -> tuple[str | None, Outcome | None]:
        """Return a criterion's fingerprint, and the outcome if that decides it.

        Its mask is compared with those of candidates bred before an index, and of descents
        committed by then, so that it does not matter how many others are by now.
        """
        try:
            fingerprint = self.fingerprints.fingerprint(criterion)
        except DegenerateScores as error:
            return None, Outcome("degenerate", reason=str(error))
        bred = self._firsts.get(fingerprint, index)
        led_to = self._led_to.get(fingerprint, committed)
        known = [first for first, end in ((bred, index), (led_to, committed)) if first < end]
        if not known:
            return fingerprint, None
        return fingerprint, Outcome("duplicate", reason=f"same mask as {min(known)}")

    def _remember(self, candidate: Candidate) -> None:
        if candidate.origin == "descent":
            self._begun.extend(candidate.parents)
            return
        for key in filter(None, (str(candidate.criterion), candidate.fingerprint)):
            self._firsts.setdefault(key, candidate.index)
