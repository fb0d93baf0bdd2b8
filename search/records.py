"""Candidates and their outcomes: what a line of the journal holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, Strict, ValidationError

from prunevolve.pruning.metric import Criterion

Kind = Literal["evaluated", "stopped", "sampled", "duplicate", "degenerate", "failed"]

OUTCOMES: tuple[str, ...] = get_args(Kind)
"""Kinds of outcome; only `evaluated` has a fitness."""

Timing = Mapping[str, float]
"""What is not reproducible about an evaluation: seconds, peak MiB, the worker's number."""

Wanted: TypeAlias = tuple[int, str, Criterion | None]
"""What losses are measured of: a task, a text's role, and a metric or else the dense model."""

Losses: TypeAlias = list[float] | None
"""Each window's mean NLL in nats per token; None where a metric cannot prune the model."""

RESOLUTION = 0.001
"""Step in which members are compared, in units of fitness; within a step the smaller metric wins
(lexicographic parsimony in buckets; Luke and Panait, GECCO 2002)."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate.

    Attributes:
        kind: One of `OUTCOMES`.
        fitness: Loss increase relative to the best baseline (`search.scale`); None unless
            evaluated.
        tokens: Fitness tokens that were run through the pruned model.
        reason: Why it was not evaluated to the end; empty if it was.
        estimate: Its fitness predicted from the windows measured, if it was stopped or sampled.
        rises: Each task's part of the fitness, predicted from its windows measured so far; None
            where none was. Empty if nothing was measured.
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
        tuned: Whether it is the parent with other numbers (`search.breeding.tuning`).
        numbers: If so, how far each is moved; empty for the mean of a tuning.
        part: Which part of the fitness windows it is measured on, and of how many; None for as many
            windows as it needs.
        best: Fitness of the best when it was bred, or of the best baseline, if lower; what is
            clearly worse is not measured to the end. None for a tuning's child.
        limit: Fitness above which it could not enter the population then (a smaller metric within a
            step of parsimony could); None if tuned.
        decided: Its outcome, if that is known without an evaluation.
    """

    index: int
    criterion: Criterion
    parents: tuple[int, ...] = ()
    fingerprint: str | None = None
    tuned: bool = False
    numbers: tuple[float, ...] = ()
    # Needed only until there is an outcome: the journal does not have them.
    part: tuple[int, int] | None = field(default=None, compare=False)
    best: float | None = field(default=None, compare=False)
    limit: float | None = field(default=None, compare=False)
    decided: Outcome | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Record:
    """A candidate with its outcome: a line of the journal. Reproducible in every field."""

    candidate: Candidate
    outcome: Outcome

    @property
    def index(self) -> int:
        """The candidate's."""
        return self.candidate.index

    @property
    def criterion(self) -> Criterion:
        """The candidate's."""
        return self.candidate.criterion

    @property
    def fitness(self) -> float | None:
        """The outcome's; None unless evaluated."""
        return self.outcome.fitness

    @property
    def loss(self) -> float:
        """The fitness, or else its prediction; infinite if there is none."""
        values = (self.outcome.fitness, self.outcome.estimate)
        return next((value for value in values if value is not None), math.inf)

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

    @property
    def described(self) -> dict[str, object]:
        """What JSON files say of a metric that was found."""
        criterion, fitness = self.criterion, self.fitness
        metric, group = criterion.text, criterion.group
        return {"metric": metric, "group": group, "fitness": fitness, "size": self.size}

    def to_dict(self) -> dict[str, object]:
        """Return a line of the journal as an object."""
        criterion, kind = self.criterion, self.outcome.kind
        own = {"metric": criterion.text, "group": criterion.group, "outcome": kind}
        known = {**vars(self.candidate), **vars(self.outcome), **own}
        return {name: known[name] for name in Line.model_fields}

    @staticmethod
    def from_dict(content: object) -> "Record":
        """Return the record in a journal's object.

        Raises:
            ValueError: If a field is missing, unknown or breaks its rule; one line that names it.
        """
        line = dict(read_line(content))
        criterion = Criterion.parse(line.pop("metric"), line.pop("group"))
        kind = line.pop("outcome")
        outcome = {x.name: line.pop(x.name) for x in fields(Outcome) if x.name in line}
        return Record(Candidate(criterion=criterion, **line), Outcome(kind, **outcome))


class Line(BaseModel):
    """The fields of a line of the journal, in order."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    index: NonNegativeInt
    metric: str
    group: str
    outcome: Kind
    fitness: float | None
    fingerprint: str | None
    tokens: NonNegativeInt
    parents: Annotated[tuple[NonNegativeInt, ...], Strict(False)]
    reason: str
    estimate: float | None
    rises: Annotated[tuple[float | None, ...], Strict(False)]
    tuned: bool = False  # a journal of an older version does not have them
    numbers: Annotated[tuple[float, ...], Strict(False)] = ()


def read_line(content: object) -> Line:
    """Return a journal's object, checked but for its metric; raises as `Record.from_dict`."""
    try:
        line = Line.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "the record"
        raise ValueError(f"{name}: {problem['msg']}, got {problem['input']!r:.40}") from error
    if (line.outcome == "evaluated") != (line.fitness is not None):
        raise ValueError(f"fitness: {line.fitness} of a candidate that is {line.outcome}")
    if any(parent >= line.index for parent in line.parents):
        raise ValueError(f"parents: {line.parents} of candidate {line.index} must be older")
    return line
