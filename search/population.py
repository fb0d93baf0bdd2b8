"""Candidates, their outcomes, and the population and hall of fame that they make."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from pruning.metric import Metric

OUTCOMES = ("evaluated", "stopped", "duplicate", "degenerate", "failed")
"""What can become of a candidate; only `evaluated` has a fitness."""


@dataclass(frozen=True)
class Candidate:
    """A bred metric on its way to an evaluation.

    Attributes:
        index: Its place in the order of breeding, from 0.
        metric: Canonical text.
        group: Comparison group.
        parents: Indices of the candidates it was bred from; empty for a random tree or a seed.
        fingerprint: Of its mask on the probe; None until taken.
        stop_above: Fitness above which it cannot enter the population, fixed when it was bred, but
            for a smaller one within a step of parsimony; None while a place is free.
    """

    index: int
    metric: str
    group: str
    parents: tuple[int, ...] = ()
    fingerprint: str | None = None
    stop_above: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        kind: One of `OUTCOMES`.
        fitness: Mean NLL on the fitness text, nats per token; None unless evaluated.
        tokens: Fitness tokens that were run through the pruned model.
        reason: Why it was not evaluated to the end; empty if it was.
    """

    kind: str
    fitness: float | None = None
    tokens: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """A line of the journal: a candidate with its outcome. Only reproducible fields."""

    index: int
    metric: str
    group: str
    outcome: str
    fitness: float | None
    fingerprint: str | None
    tokens: int
    parents: tuple[int, ...]
    reason: str

    @staticmethod
    def of(candidate: Candidate, outcome: Outcome) -> "Record":
        return Record(
            index=candidate.index,
            metric=candidate.metric,
            group=candidate.group,
            outcome=outcome.kind,
            fitness=outcome.fitness,
            fingerprint=candidate.fingerprint,
            tokens=outcome.tokens,
            parents=candidate.parents,
            reason=outcome.reason,
        )

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Record":
        """Rebuild a record from its JSON object; raises ValueError if it is not one."""
        try:
            record = Record(**{**fields, "parents": tuple(fields["parents"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a journal record: {str(fields)[:80]}") from error
        if record.outcome not in OUTCOMES:
            raise ValueError(f"outcome must be one of {OUTCOMES}, got {record.outcome!r}")
        measured = isinstance(record.fitness, float) and math.isfinite(record.fitness)
        if not (measured if record.outcome == "evaluated" else record.fitness is None):
            raise ValueError(
                f"fitness must be a finite number if evaluated, otherwise null, got "
                f"{record.fitness!r:.40} of {record.outcome}"
            )
        return record

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def size(self) -> int:
        """Number of nodes of the metric."""
        return Metric.parse(self.metric).size

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key by fitness alone: better first, and of equals the older."""
        assert self.fitness is not None
        return self.fitness, self.index


@dataclass(frozen=True)
class Rules:
    """How outcomes make a population.

    Attributes:
        capacity: Members that survive.
        resolution: Fitness is compared in steps of so much, nats per token; within a step the
            smaller metric wins (lexicographic parsimony in buckets; Luke and Panait, GECCO 2002).
            0 compares fitness alone.
        near: Whether two records have nearly one mask; of such, only the fitter is a member, so
            that a population never is one mask many times.
        kept: Members of each comparison group that stay, however they rank: a group that is worse
            at first can be the better one after some breeding.
        patience: Outcomes without a better best after which the population starts anew; None
            for never.
        lag: Outcomes that a child does not wait for.
    """

    capacity: int
    resolution: float = 0.0
    near: Callable[[Candidate | Record, Record], bool] = lambda record, other: False
    kept: int = 0
    patience: int | None = None
    lag: int = 0

    def rank(self, record: Record) -> tuple[float, ...]:
        """Sort key: better first, then smaller, then older."""
        assert record.fitness is not None
        if not self.resolution:
            return record.rank
        return round(record.fitness / self.resolution), record.size, record.index


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order.

    Attributes:
        committed: How many.
        population: The evaluated candidates that survive, best first.
        hall_of_fame: The best of each size so far, by ascending size.
        began: Index of the first candidate that was bred for this population.
        improved: Outcomes committed when this population's best was last improved upon.
    """

    committed: int = 0
    population: tuple[Record, ...] = ()
    hall_of_fame: tuple[Record, ...] = ()
    began: int = 0
    improved: int = 0

    def commit(self, record: Record, rules: Rules) -> "State":
        """Return the state after one more outcome; the worst beyond the capacity is dropped."""
        assert record.index == self.committed, (record.index, self.committed)
        state = replace(self, committed=self.committed + 1)
        if record.fitness is not None:
            remembered = best_of_each_size((*self.hall_of_fame, record))
            state = replace(state, hall_of_fame=remembered)
            # Before `began` it was bred from a population that was given up.
            if record.index >= self.began:
                state = state._admit(record, rules)
        if rules.patience and state.committed - max(state.improved, state.began) >= rules.patience:
            state = replace(state, population=(), began=state.committed + rules.lag)
        return state

    def _admit(self, record: Record, rules: Rules) -> "State":
        """Return the state with a record in the population, if it earns its place there."""
        like = [member for member in self.population if rules.near(record, member)]
        if any(rules.rank(member) < rules.rank(record) for member in like):
            return self
        others = [member for member in self.population if member not in like]
        population = sorted((*others, record), key=rules.rank)
        if len(population) > rules.capacity:
            population.remove(_droppable(population, rules)[-1])
        improved = self.committed if population[0] == record else self.improved
        return replace(self, population=tuple(population), improved=improved)

    @property
    def best(self) -> Record | None:
        """The fittest so far."""
        return min(self.hall_of_fame, key=lambda record: record.rank, default=None)

    @property
    def pareto_front(self) -> tuple[Record, ...]:
        """The members of the hall of fame that no smaller one equals or beats."""
        return pareto_front(self.hall_of_fame)

    def worst_fitness(self, group: str, rules: Rules) -> float | None:
        """Return the fitness to beat for a place in a group, or None while there is one free."""
        if len(self.population) < rules.capacity:
            return None
        if sum(member.group == group for member in self.population) < rules.kept:
            return None
        droppable = _droppable(self.population, rules, also=group)
        return max(member.rank for member in droppable)[0]

    def finalists(self, count: int) -> list[Record]:
        """Return the fittest of population and hall of fame together, best first."""
        members = {record.index: record for record in (*self.population, *self.hall_of_fame)}
        return sorted(members.values(), key=lambda record: record.rank)[:count]


def best_of_each_size(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the fittest evaluated record of each size, by ascending size."""
    best: dict[int, Record] = {}
    for record in records:
        if record.fitness is not None:
            best[record.size] = min(best.get(record.size, record), record, key=lambda r: r.rank)
    return tuple(best[size] for size in sorted(best))


def pareto_front(records: Iterable[Record]) -> tuple[Record, ...]:
    """Return the evaluated records that no smaller one equals or beats, by ascending size."""
    front: list[Record] = []
    for record in best_of_each_size(records):
        # By fitness alone: a larger metric that is only as good is no gain, even if it is older.
        if not front or record.rank[0] < front[-1].rank[0]:
            front.append(record)
    return tuple(front)


def _droppable(population: Sequence[Record], rules: Rules, also: str = "") -> list[Record]:
    """Return the members of groups that have more than the kept ones, `also` counted once more."""
    members = Counter(member.group for member in population)
    members[also] += 1
    return [member for member in population if members[member.group] > rules.kept]
