"""The verdict on a run: is what it found better than the best named metric on the report text?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pruning.baselines import BASELINES

CLEAR = 2.0
"""Standard errors from which on a difference counts as one."""

_AGAINST = "the best named metric on the report text"

Kind = Literal["better", "level", "worse", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """What the report text says about the metric that a run found.

    Attributes:
        kind: Beside the best named metric: better or worse by at least `CLEAR` standard errors,
            level if it is neither, unknown if there is nothing to compare with or no error.
        sentence: The same as one sentence, with perplexities and standard errors.
    """

    kind: Kind
    sentence: str


@dataclass(frozen=True)
class _Comparison:
    """The best found beside the named metric that does best on one task's report text.

    Attributes:
        fall: Of perplexity, as a fraction of the named metric's; negative where it rises.
        errors: The paired difference in its standard errors; None if there is no error.
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
        summary: What `summary.json` holds: `best`, `baselines` and `behind_best`, or `tasks` that
            each have them; `overlap` of the masks if it was measured.
    """
    tasks: Sequence[Mapping[str, Any]] = summary.get("tasks") or [summary]
    found = [_compared(task) for task in tasks if task["baselines"]]
    if len(found) < len(tasks):
        return Verdict("unknown", "No named metric was measured: there is nothing to compare with.")
    kinds = {one.kind for one in found}
    if len(kinds) == 1:
        kind = found[0].kind
    else:
        kind = "unknown" if "unknown" in kinds else "worse" if "worse" in kinds else "level"
    names = [task.get("name", "") for task in tasks]
    sentence = _sentence(found[0]) if len(found) == 1 else _over_tasks(names, found)
    double = _double(tasks)
    if not double:
        return Verdict(kind, sentence)
    is_best = all(one.named == double for one in found)
    identity = _identity(double, is_best, summary["best"])
    # Beside its own double it is level, which need not be said.
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


def _sentence(one: _Comparison) -> str:
    against = f"{one.named}, {_AGAINST}"
    values = f"perplexity {one.found:.2f} against {one.best_named:.2f}"
    if one.kind == "better":
        return f"Beats {against}: {values}, {one.fall:.1%} lower, {_errors(one)}."
    if one.kind == "worse":
        return f"Does not beat {against}: {values}, {-one.fall:.1%} higher, {_errors(one)}."
    if one.kind == "level":
        return f"Does not clearly beat {against}, nor lose to it: {values}, {_errors(one)}."
    return f"Beside {against}: {values}, on a single window, so the error is not known."


def _errors(one: _Comparison) -> str:
    return f"{one.errors:.1f} standard errors apart"


def _over_tasks(names: Sequence[str], found: Sequence[_Comparison]) -> str:
    count = len(found)
    if all(one.kind == "better" for one in found):
        falls = [one.fall for one in found]
        errors = [one.errors or 0.0 for one in found]
        return (
            f"Beats {_AGAINST} of each of the {count} tasks, by {min(falls):.1%} to "
            f"{max(falls):.1%} of perplexity and {min(errors):.1f} to {max(errors):.1f} "
            "standard errors."
        )
    words = {
        "better": "better on",
        "level": "level on",
        "worse": "worse on",
        "unknown": "not known on",
    }
    parts = []
    for kind, word in words.items():
        those = [name for name, one in zip(names, found, strict=True) if one.kind == kind]
        if those:
            parts.append(f"{word} {len(those)} of {count} tasks ({', '.join(those)})")
    return f"Beside {_AGAINST}: {', '.join(parts)}."


def _double(tasks: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the named metric whose masks those of the best found are; None if there is none."""
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
    """Whether masks, or losses where no masks were compared, are the same as a named metric's."""
    if overlaps := task.get("overlap", {}).get(name):
        return all(overlap == 1 for overlap in overlaps.values())
    gap = task["behind_best"].get(name)
    # One window could agree by chance; two and more with no error between them do not.
    return gap is not None and gap["nats"] == 0 and gap["standard_error"] == 0
