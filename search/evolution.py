"""The loop: steady state with a fixed lag. It knows nothing about devices, files or Ray.

Child i is bred from the population after outcomes 0 .. i - lag - 1 are committed, with a generator
seeded by (seed, i), and outcomes are committed in order of i, whenever they arrive. So the records
are the same for any number of workers, however they race, and an interrupted run continues by
replaying its records.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.fingerprint import Fingerprints
from prunevolve.search.population import State
from prunevolve.search.records import Candidate, Outcome, Record
from prunevolve.search.surrogate import Surrogate


class Evolution:
    """A search with an ask-and-tell interface: `ask` for candidates, `tell` their outcomes.

    Args:
        weights: The weight of each task in the fitness; they add up to 1.
        marks: Tells which candidates have equal or nearly equal masks.
        start: A state early enough to breed every child that is not among the records.
        records: All earlier committed records, in order; empty for a new search.
    """

    def __init__(
        self,
        breeder: Breeder,
        weights: Sequence[float],
        marks: Fingerprints,
        start: State,
        records: Iterable[Record] = (),
    ) -> None:
        self.breeder, self.search = breeder, breeder.search
        self.marks = marks
        self._firsts: dict[str, int] = {}  # the first index of each text and fingerprint
        self._surrogate = None
        if self.search.brood > 1:
            self._surrogate = Surrogate(marks.sketch, weights, self.search.crowding)
        self._states = {start.committed: start}
        self._committed = start.committed
        for record in records:
            self._remember(record.candidate)
            if record.index >= start.committed:
                self._commit(record)
            elif self._surrogate:
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

    def _propose(self, state: State) -> Candidate:
        """Breed a brood, and return the most promising of its new children."""
        children = self.breeder.brood(self._bred, state)
        if self._surrogate and len(children) > 1:
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
        if self._surrogate:
            self._surrogate.learn(record)
        state = self.state.commit(record, self.search, self.near)
        self._committed = state.committed
        self._states[self._committed] = state
        self._states.pop(self._committed - self.search.lag - 1, None)

    def near(self, one: Criterion, other: Criterion) -> bool:
        """Return whether two criteria make nearly the same mask."""
        crowding = self.search.crowding
        return crowding > 0 and self.marks.distance(one, other) < crowding

    def _decide(self, candidate: Candidate) -> Candidate:
        """Add the fingerprint, and the outcome if it needs no evaluation.

        A sample is always measured: it sees fewer windows, so it is no duplicate and causes none.
        """
        is_sample = bool(candidate.numbers)
        text = str(candidate.criterion)
        if text in self._firsts and not is_sample:
            return replace(candidate, decided=self._duplicate("text", text))
        try:
            mark = self.marks.fingerprint(candidate.criterion)
        except DegenerateScores as error:
            return replace(candidate, decided=Outcome("degenerate", reason=str(error)))
        if is_sample:
            return candidate
        same = self._duplicate("mask", mark) if mark in self._firsts else None
        return replace(candidate, fingerprint=mark, decided=same)

    def _duplicate(self, what: str, key: str) -> Outcome:
        return Outcome("duplicate", reason=f"same {what} as {self._firsts[key]}")

    def _remember(self, candidate: Candidate) -> None:
        if not candidate.numbers:  # see `_decide`
            for key in filter(None, (str(candidate.criterion), candidate.fingerprint)):
                self._firsts.setdefault(key, candidate.index)
