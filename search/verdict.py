"""The verdict on a run: does its metric beat the best named metric on the report text?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pruning.baselines import BASELINES

CLEAR = 2.0
"""Standard errors above which a difference counts as clear."""

_AGAINST = "the best named metric on the report text"

Kind = Literal["better", "level", "worse", "unknown"]


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

    kind: Kind
    named: str
    found: float
    best_named: float
    errors: float | None

    @property
    def fall(self) -> float:
        return 1 - self.found / self.best_named


def verdict_of(summary: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a run, over all its tasks.

    Args:
        summary: Contents of `summary.json`: `best`, `baselines` and `behind_best`, or `tasks` that
            each have these; `overlap` of the masks if it was measured.
    """
    tasks: Sequence[Mapping[str, Any]] = summary.get("tasks") or [summary]
    comparisons = [_compared(task) for task in tasks if task["baselines"]]
    if len(comparisons) < len(tasks):
        return Verdict("unknown", "No named metric was measured: there is nothing to compare with.")
    kinds = {comparison.kind for comparison in comparisons}
    if len(kinds) == 1:
        kind = comparisons[0].kind
    else:
        kind = "unknown" if "unknown" in kinds else "worse" if "worse" in kinds else "level"
    names = [task.get("name", "") for task in tasks]
    single = len(comparisons) == 1
    sentence = _sentence(comparisons[0]) if single else _over_tasks(names, comparisons)
    double = _double(tasks)
    if not double:
        return Verdict(kind, sentence)
    is_best = all(comparison.named == double for comparison in comparisons)
    identity = _identity(double, is_best, summary["best"])
    # That it is level with its double goes without saying.
    return Verdict(kind, identity if is_best else f"{identity} {sentence}")


def _compared(task: Mapping[str, Any]) -> _Comparison:
    named = min(task["baselines"], key=lambda name: task["baselines"][name])
    gap = task["behind_best"][named]
    nats, error = gap["nats"], gap["standard_error"]
    if error is None:
        errors = None
    elif error:
        errors = abs(nats) / error
    else:
        errors = math.inf if nats else 0.0
    kind: Kind
    if errors is None:
        kind = "unknown"
    elif errors < CLEAR:
        kind = "level"
    else:
        kind = "better" if nats > 0 else "worse"
    perplexity, best_named = task["best"]["perplexity"], task["baselines"][named]
    return _Comparison(kind, named, perplexity, best_named, errors)


def _sentence(result: _Comparison) -> str:
    against = f"{result.named}, {_AGAINST}"
    values = f"perplexity {result.found:.2f} against {result.best_named:.2f}"
    errors = f"{result.errors:.1f} standard errors apart" if result.errors is not None else ""
    if result.kind == "better":
        return f"Beats {against}: {values}, {result.fall:.1%} lower, {errors}."
    if result.kind == "worse":
        return f"Does not beat {against}: {values}, {-result.fall:.1%} higher, {errors}."
    if result.kind == "level":
        return f"Does not clearly beat {against}, nor lose to it: {values}, {errors}."
    return f"Compared with {against}: {values}, on a single window, so the error is unknown."


def _over_tasks(names: Sequence[str], comparisons: Sequence[_Comparison]) -> str:
    count = len(comparisons)
    if all(comparison.kind == "better" for comparison in comparisons):
        falls = [comparison.fall for comparison in comparisons]
        errors = [comparison.errors or 0.0 for comparison in comparisons]
        return (
            f"Beats {_AGAINST} of each of the {count} tasks: perplexity {min(falls):.1%} to "
            f"{max(falls):.1%} lower, {min(errors):.1f} to {max(errors):.1f} standard errors apart."
        )
    words = {
        "better": "better on",
        "level": "level on",
        "worse": "worse on",
        "unknown": "unknown on",
    }
    parts = []
    for kind, word in words.items():
        matching = [
            name
            for name, comparison in zip(names, comparisons, strict=True)
            if comparison.kind == kind
        ]
        if matching:
            parts.append(f"{word} {len(matching)} of {count} tasks ({', '.join(matching)})")
    return f"Compared with {_AGAINST}: {', '.join(parts)}."


def _double(tasks: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the named metric with the same masks as the best found; None if there is none."""
    for name in tasks[0]["baselines"]:
        if all(_same_masks(task, name) for task in tasks):
            return str(name)
    return None


def _identity(named: str, is_best: bool, best: Mapping[str, Any]) -> str:
    known = BASELINES.get(named)
    name = f"{named}, {_AGAINST}," if is_best else named
    if known and known.criterion.text == best.get("metric"):
        return f"Is {named} itself" + (f", {_AGAINST}." if is_best else ".")
    return f"Is {name} under another spelling: every mask is the same."


def _same_masks(task: Mapping[str, Any], name: str) -> bool:
    """Return whether masks, or losses if masks were not compared, equal a named metric's."""
    if overlaps := task.get("overlap", {}).get(name):
        return all(overlap == 1 for overlap in overlaps.values())
    gap = task["behind_best"].get(name)
    # One window could agree by chance; two or more with a standard error of 0 do not.
    return gap is not None and gap["nats"] == 0 and gap["standard_error"] == 0
