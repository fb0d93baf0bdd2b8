"""The summary of a finished run: what `summary.json` holds. Perplexities are on the report text."""

from pydantic import BaseModel, ConfigDict

Fractions = dict[str, dict[str, float]]
"""A fraction of each layer's weights, by metric and layer."""


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True)


class Gap(_Values):
    """How far a named metric is behind the best found, window by window.

    Attributes:
        nats: Mean difference in nats per token, positive if the named metric is worse.
        standard_error: Of the mean; None on a single window.
    """

    nats: float
    standard_error: float | None


class TextResult(_Values):
    """Perplexities on one kind of text of a task; `named` is the best named metric there."""

    text: str
    dense: float
    named: str
    named_perplexity: float
    perplexity: float
    relative_rise: float


class Measured(_Values):
    """A metric's perplexity."""

    perplexity: float


class FrontMember(Measured):
    """A member of the Pareto front, by its index in the journal."""

    index: int


class Winner(Measured):
    """The metric chosen on the selection text."""

    metric: str
    group: str
    size: int
    fitness: float


class TaskResult(_Values):
    """What was measured for one task.

    Attributes:
        baselines: Perplexity of each named metric that can prune the model.
        perplexity_of: Provenance of the report text, and the weights' dtype.
        front: Members of the Pareto front that can prune the model.
        layers: Fraction of zeros, by metric and layer; the winner is `best`.
        overlap: For each named metric and layer, the weights that it and the winner both prune,
            over those that either prunes.
    """

    name: str
    model: str
    sparsity: float
    pattern: str
    weight: float
    dense: float
    baselines: dict[str, float]
    best: Measured
    behind_best: dict[str, Gap]
    by_text: tuple[TextResult, ...]
    perplexity_of: dict[str, object]
    front: tuple[FrontMember, ...]
    layers: Fractions
    overlap: Fractions

    @property
    def has_groups(self) -> bool:
        """Whether weights compete in a metric's own group: an n:m pattern has its own."""
        return self.pattern == "unstructured"


class Finalist(_Values):
    """A candidate scored on the selection text, with its paired difference to the winner."""

    index: int
    metric: str
    group: str
    size: int
    fitness: float
    selection_loss: float
    difference: float
    standard_error: float | None


class Diversity(_Values):
    """Members of the final population, distinct masks among them, and their mean distance."""

    members: int
    masks: int
    mean_distance: float


class Summary(_Values):
    """A finished run. In the file, the first task's results also stand at the top level.

    Attributes:
        outcomes: Number of candidates by kind of outcome.
        selection: The finalists, best first.
        seconds: Time since this process began the run.
    """

    verdict: str
    best: Winner
    candidates: int
    outcomes: dict[str, int]
    pruning: dict[str, object]
    fitness_unit: str
    tasks: tuple[TaskResult, ...]
    selection: tuple[Finalist, ...]
    seconds: float
    diversity: Diversity

    def to_dict(self) -> dict[str, object]:
        """Return the contents of the file."""
        leading = {"dense", "baselines", "behind_best", "perplexity_of"}
        return {**self.model_dump(), **self.tasks[0].model_dump(include=leading)}
