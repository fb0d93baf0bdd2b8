"""A finished run's summary, as `summary.json` holds it, and its verdict, on the report text.

The verdict says whether the run's metric beats the best named metric there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prunevolve.pruning.baselines import BASELINES

CLEAR = 2.0
"""Standard errors above which a difference counts as clear."""

_BEST_NAMED = "the best named metric on the report text"

Kind = Literal["better", "level", "worse", "unknown"]

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


class FactorWorth(_Values):
    """What a factor of the winner is worth on the selection text: what leaving it out costs.

    Attributes:
        factor: Its metric; a divisor as `quot(1, x)`.
        difference: Loss without it minus that with it, window by window; None if the metric cannot
            prune without it.
    """

    factor: str
    difference: float | None = None
    standard_error: float | None = None


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
        factors: Those of the winner, if it is a product.
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
    factors: tuple[FactorWorth, ...]
    seconds: float
    diversity: Diversity

    def to_dict(self) -> dict[str, object]:
        """Return the contents of the file."""
        leading = {"dense", "baselines", "behind_best", "perplexity_of"}
        return {**self.model_dump(), **self.tasks[0].model_dump(include=leading)}


@dataclass(frozen=True)
class Verdict:
    """How the metric that a run found does on the report text.

    Attributes:
        kind: Compared with the best named metric: better or worse by at least `CLEAR` standard
            errors, level if neither, unknown if there is nothing to compare with or no error.
        sentence: The same as a sentence, with perplexities and standard errors.
    """

    kind: Kind
    sentence: str


@dataclass(frozen=True)
class _Comparison:
    """The best found compared with the best named metric on one task's report text.

    Attributes:
        fall: Fall in perplexity, as a fraction of the named metric's; negative if it rises.
        errors: The paired difference in standard errors; None if there is no error.
    """

    task: str
    named: str
    kind: Kind
    fall: float
    errors: float | None
    sentence: str


def verdict_of(tasks: Sequence[TaskResult], metric: str) -> Verdict:
    """Return the verdict over these tasks on the metric that was found."""
    if not all(task.baselines for task in tasks):
        return Verdict("unknown", "No named metric was measured: there is nothing to compare with.")
    comparisons = [_compare(task) for task in tasks]
    kinds = {comparison.kind for comparison in comparisons}
    # Tasks that differ are as good as the worst.
    kind = next(kind for kind in ("unknown", "worse", "level", "better") if kind in kinds)
    sentence = comparisons[0].sentence if len(tasks) == 1 else _over_tasks(comparisons)
    same = _named_with_same_masks(tasks)
    if not same:
        return Verdict(kind, sentence)
    is_best = all(comparison.named == same for comparison in comparisons)
    identity = _identity(same, is_best, metric)
    # That it is level with itself goes without saying.
    return Verdict(kind, identity if is_best else f"{identity} {sentence}")


def _compare(task: TaskResult) -> _Comparison:
    named = min(task.baselines, key=lambda name: task.baselines[name])
    gap, found, best_named = task.behind_best[named], task.best.perplexity, task.baselines[named]
    fall, against = 1 - found / best_named, f"{named}, {_BEST_NAMED}"
    values = f"perplexity {found:.2f} against {best_named:.2f}"
    if gap.standard_error is None:
        why = "on a single window, so the error is unknown"
        sentence = f"Compared with {against}: {values}, {why}."
        return _Comparison(task.name, named, "unknown", fall, None, sentence)
    kind: Kind
    errors = math.inf if gap.nats else 0.0
    if gap.standard_error:
        errors = abs(gap.nats) / gap.standard_error
    apart = f"{errors:.1f} standard errors apart"
    if errors < CLEAR:
        kind = "level"
        sentence = f"Does not clearly beat {against}, nor lose to it: {values}, {apart}."
    elif gap.nats > 0:
        kind = "better"
        sentence = f"Beats {against}: {values}, {fall:.1%} lower, {apart}."
    else:
        kind = "worse"
        sentence = f"Does not beat {against}: {values}, {-fall:.1%} higher, {apart}."
    return _Comparison(task.name, named, kind, fall, errors, sentence)


def _over_tasks(comparisons: Sequence[_Comparison]) -> str:
    count = len(comparisons)
    if all(comparison.kind == "better" for comparison in comparisons):
        falls = [comparison.fall for comparison in comparisons]
        errors = [comparison.errors or 0.0 for comparison in comparisons]
        return (
            f"Beats {_BEST_NAMED} of each of the {count} tasks: perplexity {min(falls):.1%} to "
            f"{max(falls):.1%} lower, {min(errors):.1f} to {max(errors):.1f} standard errors apart."
        )
    parts = []
    for kind in ("better", "level", "worse", "unknown"):
        names = [comparison.task for comparison in comparisons if comparison.kind == kind]
        if names:
            parts.append(f"{kind} on {len(names)} of {count} tasks ({', '.join(names)})")
    return f"Compared with {_BEST_NAMED}: {', '.join(parts)}."


def _named_with_same_masks(tasks: Sequence[TaskResult]) -> str:
    """Return the named metric whose masks all equal those of the best found; empty if none."""
    for name in tasks[0].baselines:
        overlaps = [task.overlap.get(name, {}) for task in tasks]
        if all(layers and set(layers.values()) == {1.0} for layers in overlaps):
            return name
    return ""


def _identity(named: str, is_best: bool, metric: str) -> str:
    if BASELINES[named].criterion.text == metric:
        return f"Is {named} itself" + (f", {_BEST_NAMED}." if is_best else ".")
    name = f"{named}, {_BEST_NAMED}," if is_best else named
    return f"Is {name} under another spelling: every mask is the same."
