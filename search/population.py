"""Candidates, their outcomes, and the population and hall of fame that they make."""

import math
from dataclasses import asdict, dataclass
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
        stop_above: Fitness above which it cannot enter the population, fixed when it was bred;
            None while the population is not full.
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
        """Sort key: better first, and of equals the older."""
        assert self.fitness is not None
        return self.fitness, self.index


@dataclass(frozen=True)
class State:
    """The search after a number of outcomes were committed in order.

    Attributes:
        committed: How many.
        population: The evaluated candidates that survive, best first.
        hall_of_fame: The best of each size so far, by ascending size.
    """

    committed: int = 0
    population: tuple[Record, ...] = ()
    hall_of_fame: tuple[Record, ...] = ()

    def commit(self, record: Record, capacity: int) -> "State":
        """Return the state after one more outcome; the worst beyond `capacity` is dropped."""
        assert record.index == self.committed, (record.index, self.committed)
        if record.fitness is None:
            return State(self.committed + 1, self.population, self.hall_of_fame)
        population = tuple(sorted((*self.population, record), key=lambda r: r.rank)[:capacity])
        best = {member.size: member for member in self.hall_of_fame}
        champion = best.get(record.size)
        if champion is None or record.rank < champion.rank:
            best[record.size] = record
        hall_of_fame = tuple(best[size] for size in sorted(best))
        return State(self.committed + 1, population, hall_of_fame)

    @property
    def best(self) -> Record | None:
        """The fittest so far."""
        return self.population[0] if self.population else None

    def worst_fitness(self, capacity: int) -> float | None:
        """Return the fitness to beat for a place, or None while there are places left."""
        return self.population[-1].fitness if len(self.population) >= capacity else None

    def finalists(self, count: int) -> list[Record]:
        """Return the fittest of population and hall of fame together, best first."""
        members = {record.index: record for record in (*self.population, *self.hall_of_fame)}
        return sorted(members.values(), key=lambda record: record.rank)[:count]
