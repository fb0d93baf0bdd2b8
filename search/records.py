"""Candidates and their outcomes: what a line of the journal holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, Strict, ValidationError

from prunevolve.pruning.metric import Criterion

Kind = Literal["evaluated", "stopped", "duplicate", "degenerate", "failed"]

OUTCOMES: tuple[str, ...] = get_args(Kind)  # kinds of outcome; only `evaluated` has a fitness

Origin = Literal["seed", "random", "child", "descent"]
"""Where a candidate comes from: the config, chance, two parents, or one whose exponents descend."""

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
    tuned: Criterion | None = None  # where a descent led, which is what was measured


class Limits(NamedTuple):
    """What a candidate must meet to be measured to the end."""

    # Fitness of the best when it was bred, or of the best baseline, if lower: of what is clearly
    # worse some windows are enough.
    best: float
    entry: float  # fitness above which it could not enter the population then


@dataclass(frozen=True)
class Candidate:
    """A criterion on its way to an outcome; the journal has all but the last two fields."""

    index: int  # its position in the order of breeding, from 0
    criterion: Criterion  # its metric is in canonical form; of a descent its parent's
    origin: Origin = "seed"
    parents: tuple[int, ...] = ()  # indices; none of a random metric or a seed
    fingerprint: str | None = None  # of its mask on the probe; None until taken
    limits: Limits | None = field(default=None, compare=False)  # None: it is measured to the end
    # Its outcome, if that is known without an evaluation.
    decided: Outcome | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Record:
    """A candidate with its outcome: a line of the journal. Reproducible in every field."""

    candidate: Candidate
    outcome: Outcome

    @property
    def index(self) -> int:
        """Index of the candidate."""
        return self.candidate.index

    @property
    def criterion(self) -> Criterion:
        """The criterion that was measured."""
        return self.outcome.tuned or self.candidate.criterion

    @property
    def fitness(self) -> float | None:
        """The fitness; None unless evaluated."""
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
        values["start"] = self.candidate.criterion.text if self.outcome.tuned else None
        return {name: values[name] for name in Line.model_fields}

    @staticmethod
    def from_dict(content: object) -> "Record":
        """Return the record in a journal's object; raises as `read_line` and `Criterion.parse`."""
        line = read_line(content)
        measured = Criterion.parse(line.metric, line.group)
        start = Criterion.parse(line.start, line.group) if line.start else measured
        candidate = Candidate(line.index, start, line.origin, line.parents, line.fingerprint)
        tuned = measured if line.start else None
        outcome = Outcome(line.outcome, line.fitness, line.tokens, line.reason, tuned)
        return Record(candidate, outcome)


class Line(BaseModel):
    """The fields of a line of the journal, in order."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    index: NonNegativeInt
    metric: str  # that was measured
    group: str
    origin: Origin
    start: str | None  # what a descent began with, if it led anywhere
    outcome: Kind
    fitness: float | None
    fingerprint: str | None
    tokens: NonNegativeInt
    parents: Annotated[tuple[NonNegativeInt, ...], Strict(False)]
    reason: str


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
