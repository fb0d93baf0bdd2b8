"""Candidates and their outcomes: what a line of the journal holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, Strict, ValidationError

from prunevolve.pruning.metric import Criterion

Kind = Literal["evaluated", "stopped", "sampled", "duplicate", "degenerate", "failed"]

OUTCOMES: tuple[str, ...] = get_args(Kind)  # kinds of outcome; only `evaluated` has a fitness

Timing = Mapping[str, float]  # of an evaluation, not reproducible: seconds, peak MiB, worker

Wanted: TypeAlias = tuple[int, str, Criterion | None]
"""What losses are measured of: a task, a text's role, and a metric or else the dense model."""

Losses: TypeAlias = list[float] | None  # mean NLL of each window, nats per token, if it can prune

RESOLUTION = 0.001
"""Step in which members are compared, in units of fitness; within a step the smaller metric wins
(lexicographic parsimony in buckets; Luke and Panait, GECCO 2002)."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate."""

    kind: Kind
    fitness: float | None = None  # loss increase relative to the best baseline, if evaluated
    tokens: int = 0  # fitness tokens that were run through the pruned model
    reason: str = ""  # why it was not evaluated to the end
    estimate: float | None = None  # of the fitness, from some windows, if stopped or sampled
    # Each task's part of the fitness, predicted from its windows; None where none was measured.
    rises: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A bred criterion on its way to an outcome; the journal has all but the last four fields."""

    index: int  # its position in the order of breeding, from 0
    criterion: Criterion  # its metric is in canonical form
    parents: tuple[int, ...] = ()  # indices; none of a random metric or a seed
    fingerprint: str | None = None  # of its mask on the probe; None until taken
    tuned: bool = False  # whether it is its parent with other numbers
    numbers: tuple[float, ...] = ()  # how far each is moved; empty for the mean of a tuning
    # Which part of the fitness windows it is measured on, and of how many; None for all it needs.
    part: tuple[int, int] | None = field(default=None, compare=False)
    # Fitness of the best when it was bred, or of the best baseline, if lower: what is clearly worse
    # is not measured to the end. None for a tuning's child.
    best: float | None = field(default=None, compare=False)
    # Fitness above which it could not enter the population then; None if tuned.
    limit: float | None = field(default=None, compare=False)
    # Its outcome, if that is known without an evaluation.
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
    def size(self) -> int:
        """Number of nodes of the metric."""
        return self.criterion.metric.size

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
        metric, group = self.criterion.text, self.criterion.group
        return {"metric": metric, "group": group, "fitness": self.fitness, "size": self.size}

    def to_dict(self) -> dict[str, object]:
        """Return a line of the journal as an object."""
        values = {**vars(self.candidate), **vars(self.outcome), **self.described}
        values["outcome"] = self.outcome.kind
        return {name: values[name] for name in Line.model_fields}

    @staticmethod
    def from_dict(content: object) -> "Record":
        """Return the record in a journal's object; raises as `read_line` and `Criterion.parse`."""
        line = read_line(content)
        criterion = Criterion.parse(line.metric, line.group)
        candidate = Candidate(
            line.index, criterion, line.parents, line.fingerprint, line.tuned, line.numbers
        )
        outcome = Outcome(
            line.outcome, line.fitness, line.tokens, line.reason, line.estimate, line.rises
        )
        return Record(candidate, outcome)


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
    """Return a journal's object, checked but for its metric; ValueError, of one line, if wrong."""
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
