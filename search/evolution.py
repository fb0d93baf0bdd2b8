"""The loop: steady state with a fixed lag. It knows no device, no file and no Ray.

Child i is bred from the population as it stands after outcomes 0 .. i - lag - 1 are committed,
with a generator seeded by (seed, i), and outcomes are committed in order of i, whenever they
arrive. So the records are the same for any number of workers, however they race, and a run that
was cut is continued by replaying its records.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pruning.masks import DegenerateScores
from pruning.metric import Metric
from search.breeding.simplify import simplify
from search.breeding.variation import Variation, child_of, choose_parents, random_metric, seeded
from search.population import Candidate, Outcome, Record, Rules, State

Fingerprint = Callable[[str, str], str]
"""Metric text and group to mask fingerprint; raises DegenerateScores if there is none."""


class Evaluations(Protocol):
    """Where candidates are evaluated."""

    def submit(self, candidate: Candidate) -> None:
        """Take a candidate; does not wait."""

    def next_outcome(self) -> tuple[int, Outcome] | None:
        """Return some submitted candidate's index and outcome, or None if none came in time."""


@dataclass(frozen=True)
class Settings:
    """The loop's knobs.

    Attributes:
        seed: With a candidate's index, seeds its breeding.
        candidates: Children to breed, whatever becomes of them.
        rules: Who survives; its `lag` is also how many outcomes a child does not wait for.
        groups: Comparison groups that are bred with the metrics; at least one.
        regroup: Probability that a child changes to another group than its parents'.
        within: Probability that both parents are of one group, each group as likely.
        seeds: Metrics with their groups, bred first, in this order.
        pool: Fraction of the population from which parents are chosen.
        parents: How many of the best of that pool can be parents.
        simplified: Whether children are brought to canonical form.
    """

    seed: int
    candidates: int
    rules: Rules
    groups: tuple[str, ...]
    regroup: float
    within: float
    seeds: tuple[tuple[Metric, str], ...]
    pool: float
    parents: int
    simplified: bool
    variation: Variation


@dataclass
class Known:
    """What has been bred so far: canonical texts and mask fingerprints, by first index."""

    texts: dict[tuple[str, str], int] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)

    def add(self, candidate: Candidate | Record) -> None:
        self.texts.setdefault((candidate.metric, candidate.group), candidate.index)
        if candidate.fingerprint:
            self.fingerprints.setdefault(candidate.fingerprint, candidate.index)


def evolve(
    settings: Settings,
    fingerprint: Fingerprint | None,
    evaluations: Evaluations,
    start: State,
    records: Sequence[Record],
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Record, State, State]]:
    """Breed, evaluate and commit candidates until there are enough of them.

    Args:
        settings: The loop's knobs.
        fingerprint: None to know candidates by their text alone.
        evaluations: Evaluates what cannot be decided here.
        start: A state of this search, `lag` or more outcomes before the end of `records`, or the
            empty state.
        records: All outcomes so far, from 0. Those that `start` lacks are committed again.
        stopping: Asked often; once True, the loop ends with what has been committed.

    Yields:
        For each new outcome, in order: its record, the state after it, and the state that a
        continuation can start from, `lag` outcomes earlier.
    """
    lag = settings.rules.lag
    states = replay(settings.rules, start, records)
    known = Known()
    for record in records:
        known.add(record)
    committed, bred = len(records), len(records)
    waiting: dict[int, Candidate] = {}
    arrived: dict[int, Outcome] = {}
    while committed < settings.candidates and not stopping():
        while bred < settings.candidates and bred - lag <= committed:
            state = states[max(0, bred - lag)]
            candidate, outcome = _decide(breed(settings, bred, state), known, fingerprint)
            candidate = replace(candidate, stop_above=threshold(candidate, state, settings.rules))
            known.add(candidate)
            waiting[bred] = candidate
            if outcome:
                arrived[bred] = outcome
            else:
                evaluations.submit(candidate)
            bred += 1
        if committed not in arrived:
            if came := evaluations.next_outcome():
                arrived[came[0]] = came[1]
            continue
        record = Record.of(waiting.pop(committed), arrived.pop(committed))
        states[committed + 1] = states[committed].commit(record, settings.rules)
        committed += 1
        oldest = max(0, committed - lag)
        states.pop(oldest - 1, None)
        yield record, states[committed], states[oldest]


def breed(settings: Settings, index: int, state: State) -> Candidate:
    """Make candidate `index`: a seed, a random tree, or a child of the population.

    The first of each population are random trees, those of the first one seeds before them. A
    child equal to a parent is replaced by a random tree (Dong et al., 2024, arXiv:2406.02924,
    Algorithm 1).
    """
    if index < len(settings.seeds):
        return Candidate(index, *_canonical(settings, *settings.seeds[index]))
    with seeded(settings.seed, index):
        if index >= state.began + settings.rules.capacity and len(state.population) >= 2:
            first, second = choose_parents(
                _mates(settings, state), settings.pool, settings.parents, settings.rules.rank
            )
            child = child_of(
                Metric.parse(first.metric), Metric.parse(second.metric), settings.variation
            )
            metric, group = _canonical(settings, child, _group_of(settings, first, second))
            if (metric, group) not in ((p.metric, p.group) for p in (first, second)):
                return Candidate(index, metric, group, (first.index, second.index))
        tree = random_metric(settings.variation)
        return Candidate(index, *_canonical(settings, tree, random.choice(settings.groups)))


def _mates(settings: Settings, state: State) -> Sequence[Record]:
    """Return the members that parents are chosen from: all, or now and then those of a group."""
    if len(settings.groups) > 1 and random.random() < settings.within:
        group = random.choice(settings.groups)
        mates = [member for member in state.population if member.group == group]
        if len(mates) >= 2:
            return mates
    return state.population


def _group_of(settings: Settings, first: Record, second: Record) -> str:
    """Inherit the group of either parent, or now and then take another."""
    others = [g for g in settings.groups if g not in (first.group, second.group)]
    if others and random.random() < settings.regroup:
        return random.choice(others)
    # Without crossover a child has nothing of its second parent.
    return (
        random.choice((first.group, second.group)) if settings.variation.crossover else first.group
    )


def _canonical(settings: Settings, metric: Metric, group: str) -> tuple[str, str]:
    return (simplify(metric, group) if settings.simplified else metric).text, group


def threshold(candidate: Candidate, state: State, rules: Rules) -> float | None:
    """Return the fitness above which a candidate cannot enter the population as it is now."""
    like = [
        member.rank[0]
        for member in state.population
        if candidate.fingerprint and rules.near(candidate, member)
    ]
    # In the place of those that it is near to, it needs to beat no other.
    return min(like, default=state.worst_fitness(candidate.group, rules))


def _decide(
    candidate: Candidate, known: Known, fingerprint: Fingerprint | None
) -> tuple[Candidate, Outcome | None]:
    """Take the fingerprint and decide what needs no evaluation."""
    name = (candidate.metric, candidate.group)
    if name in known.texts:
        return candidate, Outcome("duplicate", reason=f"same text as {known.texts[name]}")
    if not fingerprint:
        return candidate, None
    try:
        mark = fingerprint(*name)
    except DegenerateScores as error:
        return candidate, Outcome("degenerate", reason=str(error))
    candidate = replace(candidate, fingerprint=mark)
    if mark in known.fingerprints:
        twin = known.fingerprints[mark]
        return candidate, Outcome("duplicate", reason=f"same mask as {twin}")
    return candidate, None


def replay(rules: Rules, start: State, records: Sequence[Record]) -> dict[int, State]:
    """Return the states by number of committed outcomes, from `start` to the end of `records`."""
    states = {start.committed: start}
    for record in records[start.committed :]:
        states[record.index + 1] = states[record.index].commit(record, rules)
    return states
