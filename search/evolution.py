"""The loop: steady state with a fixed lag. It knows no device, no file and no Ray.

Child i is bred from the population as it stands after outcomes 0 .. i - lag - 1 are committed,
with a generator seeded by (seed, i), and outcomes are committed in order of i, whenever they
arrive. So the records are the same for any number of workers, however they race, and a run that
was cut is continued by replaying its records.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pruning.metric import Metric
from search.population import Candidate, Outcome, Record, State
from search.simplify import simplify
from search.variation import Variation, child_of, choose_parents, random_metric, seeded


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
        population: Evaluated candidates that survive.
        lag: Outcomes that a child does not wait for.
        group: Comparison group of every candidate.
        seeds: Metrics bred first, in this order.
        pool: Fraction of the population from which parents are chosen.
        parents: How many of the best of that pool can be parents.
    """

    seed: int
    candidates: int
    population: int
    lag: int
    group: str
    seeds: tuple[Metric, ...]
    pool: float
    parents: int
    variation: Variation


@dataclass
class Known:
    """What has been bred so far: canonical texts and mask fingerprints, by first index."""

    texts: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)

    def add(self, candidate: Candidate | Record) -> None:
        self.texts.setdefault(candidate.metric, candidate.index)
        if candidate.fingerprint:
            self.fingerprints.setdefault(candidate.fingerprint, candidate.index)


def evolve(
    settings: Settings,
    fingerprint: Callable[[Metric], str],
    evaluations: Evaluations,
    start: State,
    records: Sequence[Record],
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Record, State, State]]:
    """Breed, evaluate and commit candidates until there are enough of them.

    Args:
        settings: The loop's knobs.
        fingerprint: Metric to mask fingerprint; raises ValueError on a degenerate metric.
        evaluations: Evaluates what cannot be decided here.
        start: A state of this search, `lag` or more outcomes before the end of `records`, or the
            empty state.
        records: All outcomes so far, from 0. Those that `start` lacks are committed again.
        stopping: Asked often; once True, the loop ends with what has been committed.

    Yields:
        For each new outcome, in order: its record, the state after it, and the state that a
        continuation can start from, `lag` outcomes earlier.
    """
    states = replay(settings, start, records)
    known = Known()
    for record in records:
        known.add(record)
    committed, bred = len(records), len(records)
    waiting: dict[int, Candidate] = {}
    arrived: dict[int, Outcome] = {}
    while committed < settings.candidates and not stopping():
        while bred < settings.candidates and bred - settings.lag <= committed:
            candidate = breed(settings, bred, states[max(0, bred - settings.lag)])
            candidate, outcome = _decide(candidate, known, fingerprint)
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
        states[committed + 1] = states[committed].commit(record, settings.population)
        committed += 1
        oldest = max(0, committed - settings.lag)
        states.pop(oldest - 1, None)
        yield record, states[committed], states[oldest]


def breed(settings: Settings, index: int, state: State) -> Candidate:
    """Make candidate `index`: a seed, a random tree, or a child of the population.

    The first `population` candidates are seeds and random trees. A child equal to a parent is
    replaced by a random tree (Dong et al., 2024, arXiv:2406.02924, Algorithm 1).
    """
    stop_above = state.worst_fitness(settings.population)
    if index < len(settings.seeds):
        text = simplify(settings.seeds[index], settings.group).text
        return Candidate(index, text, settings.group, (), None, stop_above)
    with seeded(settings.seed, index):
        parents: tuple[int, ...] = ()
        metric = None
        if index >= settings.population and len(state.population) >= 2:
            first, second = choose_parents(
                state.population, settings.pool, settings.parents, lambda record: record.rank
            )
            child = child_of(
                Metric.parse(first.metric), Metric.parse(second.metric), settings.variation
            )
            metric = simplify(child, settings.group)
            parents = (first.index, second.index)
            if metric.text in (first.metric, second.metric):
                metric, parents = None, ()
        if metric is None:
            metric = simplify(random_metric(settings.variation), settings.group)
    return Candidate(index, metric.text, settings.group, parents, None, stop_above)


def _decide(
    candidate: Candidate, known: Known, fingerprint: Callable[[Metric], str]
) -> tuple[Candidate, Outcome | None]:
    """Take the fingerprint and decide what needs no evaluation."""
    if candidate.metric in known.texts:
        twin = known.texts[candidate.metric]
        return candidate, Outcome("duplicate", reason=f"same text as {twin}")
    try:
        mark = fingerprint(Metric.parse(candidate.metric))
    except ValueError as error:
        return candidate, Outcome("degenerate", reason=str(error))
    candidate = replace(candidate, fingerprint=mark)
    if mark in known.fingerprints:
        twin = known.fingerprints[mark]
        return candidate, Outcome("duplicate", reason=f"same mask as {twin}")
    return candidate, None


def replay(settings: Settings, start: State, records: Sequence[Record]) -> dict[int, State]:
    """Return the states by number of committed outcomes, from `start` to the end of `records`."""
    states = {start.committed: start}
    for record in records[start.committed :]:
        state = states[record.index]
        states[record.index + 1] = state.commit(record, settings.population)
    return states
