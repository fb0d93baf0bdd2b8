"""The loop: steady state with a fixed lag. It knows nothing about devices, files or Ray.

Child i is bred from the population after outcomes 0 .. i - lag - 1 are committed, with a generator
seeded by (seed, i), and outcomes are committed in order of i, whenever they arrive. So the records
are the same for any number of workers, however they race, and an interrupted run continues by
replaying its records.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pruning.criterion import Criterion
from pruning.masks import DegenerateScores
from search.breeding.simplify import simplify
from search.breeding.variation import Variation, child_of, choose_parents, random_metric, seeded
from search.fingerprint import Sketch
from search.population import Candidate, Outcome, Record, Rules, State
from search.surrogate import Surrogate

_BRED_AGAIN = 5
"""Number of records that a resumed search breeds again to check that they are its own."""

_EXPLORES = -1
"""Added to the seed of a candidate's breeding to draw whether it explores."""


class Marks(Protocol):
    """Compares criteria by their masks on a probe."""

    def fingerprint(self, criterion: Criterion) -> str:
        """Return the fingerprint of a criterion's mask; raise DegenerateScores if there is none."""

    def distance(self, one: Criterion, other: Criterion) -> float:
        """Return the fraction of weights on which the two masks differ."""

    def sketch(self, criterion: Criterion) -> Sketch:
        """Return a sample of a criterion's mask for each task, of equal sizes for all criteria."""


@dataclass(frozen=True)
class Settings:
    """The loop's knobs.

    Attributes:
        seed: With a candidate's index, seeds its breeding.
        candidates: Children to breed, whatever their outcomes.
        rules: Rules of survival; a child is bred without waiting for the last `lag` outcomes.
        groups: Comparison groups that are bred along with the metrics; at least one.
        regroup: Probability that a child takes a group that neither parent has.
        within: Probability that both parents come from one group, drawn with equal chances.
        seeds: Criteria that come first, in this order.
        pool: Fraction of the population that is drawn for choosing parents.
        parents: How many of the best in that pool can become parents.
        simplified: Whether children are brought to canonical form.
        crowding: Masks that differ in a smaller fraction share one place; 0 allows all.
        brood: Children bred for each candidate, of which the most promising becomes the candidate.
            More than one needs marks.
        exploration: Fraction of candidates that are one mutation away from a member and that the
            surrogate does not choose: it knows nothing of masks unlike all measured ones.
        variation: How children are made.
        units: `required` if scores under the group `model` must have none, or `off`.
        weights: Weight of each task in the fitness, which add up to 1; for the surrogate.
        worst: Share of the worst task in the fitness; the rest is the weighted mean.
    """

    seed: int
    candidates: int
    rules: Rules
    groups: tuple[str, ...]
    regroup: float
    within: float
    seeds: tuple[Criterion, ...]
    pool: float
    parents: int
    simplified: bool
    crowding: float
    brood: int
    exploration: float
    variation: Variation
    units: str = "off"
    weights: tuple[float, ...] = (1.0,)
    worst: float = 0.0


@dataclass
class _Known:
    """Everything bred so far: the first index of each criterion and fingerprint."""

    criteria: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)

    def add(self, candidate: Candidate) -> None:
        self.criteria.setdefault(str(candidate.criterion), candidate.index)
        if candidate.fingerprint:
            self.fingerprints.setdefault(candidate.fingerprint, candidate.index)


class Evolution:
    """A search with an ask-and-tell interface: `ask` for candidates, `tell` their outcomes.

    Args:
        settings: The loop's knobs.
        marks: Finds candidates that need no evaluation; without it, only equal texts are found.
        start: A state early enough to breed every child that is not among the records.
        records: All earlier committed records, in order; empty for a new search.
    """

    def __init__(
        self,
        settings: Settings,
        marks: Marks | None,
        start: State,
        records: Iterable[Record] = (),
    ) -> None:
        self.settings = settings
        self.marks = marks
        self.rules = settings.rules
        if marks and settings.crowding:
            self.rules = replace(settings.rules, near=self._near)
        self._known = _Known()
        self._surrogate = None
        if marks and settings.brood > 1:
            weights, worst = settings.weights, settings.worst
            self._surrogate = Surrogate(marks.sketch, weights, worst, settings.crowding)
        self._states = {start.committed: start}
        self._committed = start.committed
        for record in records:
            self._known.add(record.candidate)
            if self._surrogate:
                self._surrogate.learn(record)
            if record.index >= start.committed:
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
        return self._states[max(0, self._committed - self.rules.lag)]

    @property
    def done(self) -> bool:
        """Whether all candidates are bred and committed."""
        return self._committed >= self.settings.candidates

    def ask(self) -> Iterator[Candidate]:
        """Breed the candidates that the lag allows, lazily, one at a time.

        The caller must `tell` an outcome for each; `decided`, where set, is that outcome.
        """
        while (
            self._bred < self.settings.candidates and self._bred - self.rules.lag <= self._committed
        ):
            state = self._states[max(0, self._bred - self.rules.lag)]
            candidate = limited(self._propose(state), state, self.rules)
            self._known.add(candidate)
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
            if self._surrogate:
                self._surrogate.learn(records[-1])
            self._commit(records[-1])
        return records

    def _propose(self, state: State) -> Candidate:
        """Breed a brood, and return the most promising of its new children.

        A candidate that explores is the first new child instead.
        """
        first = None
        for child in self._by_promise(state):
            child = self._decide(child)
            if not child.decided:
                return child
            first = first or child
        assert first
        return first

    def _by_promise(self, state: State) -> Iterator[Candidate]:
        """Breed a brood and yield it, the most promising first, or one by one if it explores."""
        settings = self.settings
        brood = 1 if self._bred < len(settings.seeds) else settings.brood
        with seeded(settings.seed, self._bred, _EXPLORES):
            explores = random.random() < settings.exploration
        if explores:
            mutated = replace(settings.variation, crossover=0.0, mutation=1.0)
            settings = replace(settings, variation=mutated)
        children = (
            breed(settings, self._bred, state, self.rules, attempt) for attempt in range(brood)
        )
        if explores or brood == 1 or not self._surrogate:
            yield from children
            return
        distinct = list({str(child.criterion): child for child in children}.values())
        self._surrogate.ask_before(state.committed)
        promises = self._surrogate.predict([child.criterion for child in distinct])
        for place in sorted(range(len(distinct)), key=promises.__getitem__):
            yield distinct[place]

    def _commit(self, record: Record) -> None:
        self._states[record.index + 1] = self._states[record.index].commit(record, self.rules)
        self._committed = record.index + 1
        self._states.pop(self._committed - self.rules.lag - 1, None)

    def _near(self, one: Criterion, other: Criterion) -> bool:
        assert self.marks
        return self.marks.distance(one, other) < self.settings.crowding

    def _decide(self, candidate: Candidate) -> Candidate:
        """Add the fingerprint, and the outcome if it needs no evaluation."""
        known = self._known
        twin = known.criteria.get(str(candidate.criterion))
        if twin is not None:
            return replace(candidate, decided=Outcome("duplicate", reason=f"same text as {twin}"))
        if not self.marks:
            return candidate
        try:
            mark = self.marks.fingerprint(candidate.criterion)
        except DegenerateScores as error:
            return replace(candidate, decided=Outcome("degenerate", reason=str(error)))
        twin = known.fingerprints.get(mark)
        same = None if twin is None else Outcome("duplicate", reason=f"same mask as {twin}")
        return replace(candidate, fingerprint=mark, decided=same)


def first_foreign(
    settings: Settings, marks: Marks | None, records: Sequence[Record]
) -> Record | None:
    """Return the first of a few early records that this search would not have bred, if any.

    Early records depend on the settings alone, so they can be bred again to compare.
    """
    evolution = Evolution(settings, marks, State())
    for record in records[: min(_BRED_AGAIN, settings.rules.capacity)]:
        if next(evolution.ask()) != record.candidate:
            return record
        evolution.tell(record.index, record.outcome)
    return None


def breed(
    settings: Settings, index: int, state: State, rules: Rules, attempt: int = 0
) -> Candidate:
    """Make candidate `index`: a seed, a random tree, or a child of the population.

    Each population begins with random trees, the first one with seeds before them. A child equal
    to a parent is replaced by a random tree (Dong et al., 2024, arXiv:2406.02924, Algorithm 1).
    """
    if index < len(settings.seeds):
        return Candidate(index, _canonical(settings, settings.seeds[index]))
    with seeded(settings.seed, index, *([attempt] if attempt else [])):
        if index >= state.began + rules.capacity and state.population:
            first, second = choose_parents(
                _mates(settings, state), settings.pool, settings.parents, rules.rank
            )
            group = _group_of(settings, first, second)
            variation = _variation_in(group, settings)
            metric = child_of(first.criterion.metric, second.criterion.metric, variation)
            child = _canonical(settings, Criterion(metric, group))
            if child not in (first.criterion, second.criterion):
                return Candidate(index, child, (first.index, second.index))
        group = _one_of(settings.groups)
        tree = random_metric(_variation_in(group, settings))
        return Candidate(index, _canonical(settings, Criterion(tree, group)))


def limited(candidate: Candidate, state: State, rules: Rules) -> Candidate:
    """Return a candidate with the limits that it must meet to enter the current population."""
    like = [
        member.rank[0]
        for member in state.population
        if candidate.fingerprint and rules.near(candidate.criterion, member.criterion)
    ]
    # It competes for the place of the members that it is near to, so it must beat only those.
    limit = min(like, default=state.worst_fitness(candidate.criterion.group, rules))
    best = min((member.rank[0] for member in state.population), default=None)
    if rules.settles:
        candidate = replace(candidate, settle_above=best)
    if limit is None and rules.leeway and best is not None:
        return replace(candidate, stop_above=best, leeway=rules.leeway)
    return replace(candidate, stop_above=limit)


def _mates(settings: Settings, state: State) -> Sequence[Record]:
    """Return the members that parents are chosen from: all, or sometimes those of one group."""
    if len(settings.groups) > 1 and random.random() < settings.within:
        group = random.choice(settings.groups)
        mates = [member for member in state.population if member.criterion.group == group]
        if len(mates) >= 2:
            return mates
    return state.population


def _group_of(settings: Settings, first: Record, second: Record) -> str:
    """Return a group inherited from either parent, or sometimes another one."""
    inherited = (first.criterion.group, second.criterion.group)
    others = [group for group in settings.groups if group not in inherited]
    if others and random.random() < settings.regroup:
        return random.choice(others)
    # Without crossover, a child inherits nothing from its second parent.
    return _one_of(inherited if settings.variation.crossover else inherited[:1])


def _one_of(groups: tuple[str, ...]) -> str:
    """Draw a group, if there is a choice."""
    return random.choice(groups) if len(set(groups)) > 1 else groups[0]


def _variation_in(group: str, settings: Settings) -> Variation:
    """Return how children of a group are made: only under `model` do layers compete."""
    if group == "model" and settings.units == "required":
        return replace(settings.variation, comparable=True)
    return settings.variation


def _canonical(settings: Settings, criterion: Criterion) -> Criterion:
    return simplify(criterion) if settings.simplified else criterion
