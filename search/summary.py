"""A finished run's summary, as `summary.json` holds it, and its verdict, on the report text.

The verdict says whether the run's metric beats the best of the baselines there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

CLEAR = 2.0
"""Standard errors above which a difference counts as clear."""

Kind = Literal["better", "level", "worse", "unknown"]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True)


class Gap(_Values):
    """How far a baseline is behind the best found, window by window.

    Attributes:
        nats: Mean difference in nats per token, positive if the baseline is worse.
        standard_error: Of the mean; None on a single window.
    """

    nats: float
    standard_error: float | None


class TextResult(_Values):
    """Perplexities on one kind of text of a task; `named` is the best baseline there."""

    text: str
    dense: float
    named: str
    named_perplexity: float
    perplexity: float
    relative_rise: float


class Measured(_Values):
    """A metric's perplexity."""

    perplexity: float


class Winner(Measured):
    """The metric chosen on the selection text."""

    metric: str
    group: str
    size: int
    fitness: float


class TaskResult(_Values):
    """What was measured for one task.

    Attributes:
        baselines: Perplexity of each baseline that can prune the model.
        perplexity_of: Provenance of the report text, and the weights' dtype.
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
        kind: Compared with the best baseline: better or worse by at least `CLEAR` standard errors,
            level if neither, unknown if there is nothing to compare with or no error.
        sentence: The same as a sentence, with perplexities and standard errors.
    """

    kind: Kind
    sentence: str


@dataclass(frozen=True)
class _Comparison:
    """The best found compared with the best baseline on one task's report text.

    Attributes:
        fall: Fall in perplexity, as a fraction of the baseline's; negative if it rises.
        errors: The paired difference in standard errors; None if there is no error.
    """

    task: str
    kind: Kind
    fall: float
    errors: float | None
    sentence: str


def verdict_of(tasks: Sequence[TaskResult]) -> Verdict:
    """Return the verdict over these tasks on the metric that was found."""
    if not all(task.baselines for task in tasks):
        return Verdict("unknown", "No baseline was measured: there is nothing to compare with.")
    comparisons = [_compare(task) for task in tasks]
    kinds = {comparison.kind for comparison in comparisons}
    # Tasks that differ are as good as the worst.
    kind = next(kind for kind in ("unknown", "worse", "level", "better") if kind in kinds)
    if len(tasks) == 1:
        return Verdict(kind, comparisons[0].sentence)
    return Verdict(kind, _over_tasks(comparisons, best_of_the_baselines(tasks)))


def best_of_the_baselines(tasks: Sequence[TaskResult]) -> str:
    """Return what a metric is compared with, and how many there were to compare it with."""
    counts = sorted({len(task.baselines) for task in tasks})
    if counts == [1]:
        return "the only baseline"
    return f"the best of the {' to '.join(map(str, counts))} baselines"


def _compare(task: TaskResult) -> _Comparison:
    named = min(task.baselines, key=lambda name: task.baselines[name])
    gap, found, best_named = task.behind_best[named], task.best.perplexity, task.baselines[named]
    fall = 1 - found / best_named
    against = f"{named}, {best_of_the_baselines([task])} on the report text"
    values = f"perplexity {found:.2f} against {best_named:.2f}"
    if gap.standard_error is None:
        why = "on a single window, so the error is unknown"
        sentence = f"Compared with {against}: {values}, {why}."
        return _Comparison(task.name, "unknown", fall, None, sentence)
    kind: Kind
    errors = math.inf if gap.nats else 0.0
    if gap.standard_error:
        errors = abs(gap.nats) / gap.standard_error
    apart = f"{errors:.1f} standard errors apart"
    if not gap.nats and not gap.standard_error:
        kind = "level"
        sentence = f"Equals {against}: the loss of every window is the same."
    elif errors < CLEAR:
        kind = "level"
        sentence = f"Does not clearly beat {against}, nor lose to it: {values}, {apart}."
    elif gap.nats > 0:
        kind = "better"
        sentence = f"Beats {against}: {values}, {fall:.1%} lower, {apart}."
    else:
        kind = "worse"
        sentence = f"Does not beat {against}: {values}, {-fall:.1%} higher, {apart}."
    return _Comparison(task.name, kind, fall, errors, sentence)


def _over_tasks(comparisons: Sequence[_Comparison], best: str) -> str:
    count = len(comparisons)
    if all(comparison.kind == "better" for comparison in comparisons):
        falls = [comparison.fall for comparison in comparisons]
        errors = [comparison.errors or 0.0 for comparison in comparisons]
        return (
            f"Beats {best} on the report text of each of the {count} tasks: perplexity "
            f"{min(falls):.1%} to {max(falls):.1%} lower, {min(errors):.1f} to {max(errors):.1f} "
            "standard errors apart."
        )
    parts = []
    for kind in ("better", "level", "worse", "unknown"):
        names = [comparison.task for comparison in comparisons if comparison.kind == kind]
        if names:
            parts.append(f"{kind} on {len(names)} of {count} tasks ({', '.join(names)})")
    return f"Compared with {best} on the report text: {', '.join(parts)}."
