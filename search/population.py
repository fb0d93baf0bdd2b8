"""Candidates, their outcomes, and the population and hall of fame that they form."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion

OUTCOMES = ("evaluated", "stopped", "duplicate", "degenerate", "failed")
"""Kinds of outcome; only `evaluated` has a fitness."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate.

    Attributes:
        kind: One of `OUTCOMES`.
        fitness: Mean NLL in nats per token, or with several cells the mean relative rise
            (`search.scale`); None unless evaluated.
        tokens: Fitness tokens that were run through the pruned model.
        reason: Why it was not evaluated to the end; empty if it was.
        estimate: If it was stopped, its fitness estimated from the windows evaluated so far.
        rises: Each task's rise in loss over the dense model, as a multiple of the best named
            metric's, estimated from the windows evaluated so far; None where none was. Empty if
            nothing was measured.
    """

    kind: str
    fitness: float | None = None
    tokens: int = 0
    reason: str = ""
    estimate: float | None = None
    rises: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A bred criterion on its way to an outcome.

    Attributes:
        index: Its position in the order of breeding, from 0.
        criterion: Its metric, in canonical form, and its comparison group.
        parents: Indices of the candidates it was bred from; empty for a random tree or a seed.
        fingerprint: Fingerprint of its mask on the probe; None until taken.
        best: Fitness of the best when it was bred; what is clearly worse is not measured to the
            end. None if there was none.
        enter: Fitness above which it could not enter the population then (a smaller metric within a
            step of parsimony could); None if there was no limit.
        decided: Its outcome, if that is known without an evaluation.
    """

    index: int
    criterion: Criterion
    parents: tuple[int, ...] = ()
    fingerprint: str | None = None
    # Needed only until there is an outcome: the journal does not have them.
    best: float | None = field(default=None, compare=False)
    enter: float | None = field(default=None, compare=False)
    decided: Outcome | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Record:
    """A candidate with its outcome: a line of the journal. Reproducible in every field."""

    candidate: Candidate
    outcome: Outcome

    @property
    def index(self) -> int:
        """The candidate's position in the order of breeding."""
        return self.candidate.index

    @property
    def criterion(self) -> Criterion:
        """The candidate's criterion."""
        return self.candidate.criterion

    @property
    def fitness(self) -> float | None:
        """As the outcome says; None unless evaluated."""
        return self.outcome.fitness

    @property
    def size(self) -> int:
        """Number of nodes of the metric."""
        return self.candidate.criterion.metric.size

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key by fitness alone: better first, ties by age."""
        assert self.fitness is not None
        return self.fitness, self.index

    @property
    def standing(self) -> tuple[float, int, int]:
        """Sort key in a population: fitter first, then smaller, then older."""
        return round(self.rank[0] / RESOLUTION), self.size, self.index

    def to_dict(self) -> dict[str, object]:
        """Return the journal's object, as `from_dict` reads it."""
        candidate, outcome = self.candidate, self.outcome
        return {
            "index": candidate.index,
            "metric": candidate.criterion.text,
            "group": candidate.criterion.group,
            "outcome": outcome.kind,
            "fitness": outcome.fitness,
            "fingerprint": candidate.fingerprint,
            "tokens": outcome.tokens,
            "parents": candidate.parents,
            "reason": outcome.reason,
            "estimate": outcome.estimate,
            "rises": outcome.rises,
        }

    @staticmethod
    def from_dict(fields: object) -> "Record":
        """Rebuild a record from its JSON object.

        Raises:
            ValueError: If a field is missing, unknown or breaks its rule; one line that names it.
        """
        if not isinstance(fields, dict) or set(fields) != set(_RULES):
            raise ValueError(f"not a journal record: {str(fields)[:80]}")
        for name, (rule, holds) in _RULES.items():
            if not holds(fields[name]):
                raise ValueError(f"{name} must be {rule}, got {fields[name]!r:.40}")
        if (fields["outcome"] == "evaluated") != (fields["fitness"] is not None):
            raise ValueError(
                "fitness must be a finite number if evaluated, otherwise null, got "
                f"{fields['fitness']!r:.40} of {fields['outcome']}"
            )
        parents = tuple(fields["parents"])
        if any(parent >= fields["index"] for parent in parents):
            raise ValueError(f"parents must be older than {fields['index']}, got {parents}")
        criterion = Criterion.parse(fields["metric"], fields["group"])
        return Record(
            Candidate(fields["index"], criterion, parents, fields["fingerprint"]),
            Outcome(
                fields["outcome"],
                fields["fitness"],
                fields["tokens"],
                fields["reason"],
                fields["estimate"],
                tuple(fields["rises"]),
            ),
        )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_finite_or_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isfinite(value))


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "index": ("a whole number from 0", _is_count),
    "metric": ("a text", _is_text),
    "group": ("a text", _is_text),
    "outcome": (f"one of {', '.join(OUTCOMES)}", lambda value: value in OUTCOMES),
    "fitness": ("a finite number or null", _is_finite_or_null),
    "fingerprint": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "tokens": ("a whole number from 0", _is_count),
    "parents": (
        "a list of indices",
        lambda value: isinstance(value, list | tuple) and all(map(_is_count, value)),
    ),
    "reason": ("a text", _is_text),
    "estimate": ("a finite number or null", _is_finite_or_null),
    "rises": (
        "a list of finite numbers or nulls",
        lambda value: isinstance(value, list | tuple) and all(map(_is_finite_or_null, value)),
    ),
}
"""For each field of a journal line, its rule in words and the check."""


RESOLUTION = 0.001
"""Step in which members are compared, in units of fitness; within a step the smaller metric wins
(lexicographic parsimony in buckets; Luke and Panait, GECCO 2002)."""

LEEWAY = 1.5
"""Highest relative rise that may fill a free place, as a multiple of the best's."""

FINALISTS = 10
"""Metrics that are measured on the selection text, from which the winner is chosen."""

Near = Callable[[Criterion, Criterion], bool]
"""Whether two criteria make nearly the same mask."""


def never(criterion: Criterion, other: Criterion) -> bool:
    """Tell any two masks apart."""
    return False


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order.

    Attributes:
        committed: Number of committed outcomes.
        population: The evaluated candidates that survive, best first.
        hall_of_fame: The best of each size so far, by ascending size.
    """

    committed: int = 0
    population: tuple[Record, ...] = ()
    hall_of_fame: tuple[Record, ...] = ()

    def commit(self, record: Record, search: Search, near: Near = never) -> "State":
        """Return the state after one more outcome; beyond its size, the population's worst goes.

        Only the fitter of two that are near is a member, so that a population never holds many
        copies of one mask.
        """
        assert record.index == self.committed, (record.index, self.committed)
        state = replace(self, committed=self.committed + 1)
        if record.fitness is not None:
            hall_of_fame = best_of_each_size((*self.hall_of_fame, record))
            state = replace(state, hall_of_fame=hall_of_fame)
            state = state._admit(record, search.population, near)
        return state

    def _admit(self, record: Record, size: int, near: Near) -> "State":
        """Return the state with a record in the population, if it earns a place there."""
        neighbours = [m for m in self.population if near(record.criterion, m.criterion)]
        if any(member.standing < record.standing for member in neighbours):
            return self
        others = [member for member in self.population if member not in neighbours]
        population = sorted((*others, record), key=lambda member: member.standing)[:size]
        return replace(self, population=tuple(population))

    @property
    def best(self) -> Record | None:
        """The fittest record so far."""
        return min(self.hall_of_fame, key=lambda record: record.rank, default=None)

    @property
    def pareto_front(self) -> tuple[Record, ...]:
        """The members of the hall of fame that no smaller member equals or beats."""
        return pareto_front(self.hall_of_fame)

    def limited(self, candidate: Candidate, search: Search, near: Near = never) -> Candidate:
        """Return a candidate with the limits that it must meet to enter this population."""
        if candidate.decided or not self.population:
            return candidate
        best = min(member.rank for member in self.population)[0]
        like = [m.rank[0] for m in self.population if near(candidate.criterion, m.criterion)]
        if like:  # it takes their place, so it must beat only those
            return replace(candidate, best=best, enter=min(like))
        if len(self.population) < search.population:
            return replace(candidate, best=best, enter=LEEWAY * max(0.0, best))
        worst = max(member.rank for member in self.population)[0]
        return replace(candidate, best=best, enter=worst)

    def finalists(self, count: int = FINALISTS) -> list[Record]:
        """Return the fittest of the population and the hall of fame together, best first."""
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
    """Return the evaluated records that no smaller record equals or beats, by ascending size."""
    front: list[Record] = []
    for record in best_of_each_size(records):
        # By fitness alone: a larger metric that is only as good is no gain, even if older.
        if not front or record.rank[0] < front[-1].rank[0]:
            front.append(record)
    return tuple(front)
