"""The verdict on a run: does its metric beat the best of the baselines on the report text?"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from prunevolve.pruning.json_file import JsonObject

CLEAR = 2.0  # standard errors above which a difference counts as clear
_KINDS = ("unknown", "worse", "level", "better")  # from the worst to the best


class Verdict(NamedTuple):
    """How the metric that a run found does on the report text, compared with the best baseline."""

    kind: str  # better or worse by at least `CLEAR` errors, or level; unknown without an error
    sentence: str


def verdict_of(tasks: Sequence[JsonObject]) -> Verdict:
    """Return the verdict over tasks as `summary.json` has them: that on the worst of them."""
    verdicts = [_on_task(task) for task in tasks]
    if len(verdicts) == 1:
        return verdicts[0]
    parts = []
    for kind in reversed(_KINDS):
        names = [task["name"] for task, v in zip(tasks, verdicts, strict=True) if v.kind == kind]
        if names:
            parts.append(f"{kind} on {len(names)} of {len(tasks)} tasks ({', '.join(names)})")
    against = f"{best_of_the_baselines(tasks)} on the report text"
    sentence = f"Compared with {against}: {', '.join(parts)}."
    if unable := [task["name"] for task in tasks if task["best"]["perplexity"] is None]:
        sentence += f" It cannot prune {', '.join(unable)}."
    return Verdict(min((v.kind for v in verdicts), key=_KINDS.index), sentence)


def looks_at_report(looks: Sequence[JsonObject]) -> str:
    """Say that the report text was looked at before, after which a result on it flatters."""
    if not looks:
        return ""
    before = ", ".join(
        f"after {look['candidates']} candidates it had {shown(look['perplexity'])}"
        for look in looks
    )
    return f" Look {len(looks) + 1} at this text: {before}."


def shown(value: float | None, digits: int = 2) -> str:
    """Return a figure of a metric; null is that of one that cannot prune the model."""
    return "none" if value is None else f"{value:.{digits}f}"


def convergence(fitness: Sequence[float | None]) -> str:
    """Say when the best of all candidates came, and what the last third of them brought."""
    best = list(accumulate((math.inf if f is None else f for f in fitness), min))
    if not best or best[-1] == math.inf:
        return "no candidate was evaluated yet"
    line = f"last improvement: candidate {best.index(best[-1])} of {len(best)}"
    before = best[len(best) - len(best) // 3 - 1]
    gain = before - best[-1]
    more = f"{gain:.4f} lower in the last third" if gain else "none in the last third"
    return line if before == math.inf else f"{line}, {more}"


def best_of_the_baselines(tasks: Sequence[JsonObject]) -> str:
    """Return what a metric is compared with."""
    return f"the best of the {max(len(task['baselines']) for task in tasks)} baselines"


def _on_task(task: JsonObject) -> Verdict:
    name = min(task["baselines"], key=task["baselines"].__getitem__)
    perplexity, baseline = task["best"]["perplexity"], task["baselines"][name]
    nats, error = task["behind_best"][name]["nats"], task["behind_best"][name]["standard_error"]
    against = f"{name}, {best_of_the_baselines([task])} on the report text"
    if perplexity is None:
        can = f"{against}, can: perplexity {baseline:.2f}"
        return Verdict("worse", f"Cannot prune the model, which {can}.")
    values = f"perplexity {perplexity:.2f} against {baseline:.2f}"
    change = abs(1 - perplexity / baseline)
    if error is None:
        why = "on a single window, so the error is unknown"
        return Verdict("unknown", f"Compared with {against}: {values}, {why}.")
    errors = abs(nats) / max(error, 1e-12)  # 0 of 0 for a baseline that was found again
    apart = f"{errors:.1f} standard errors apart"
    if errors < CLEAR:
        level = f"Does not clearly beat {against}, nor lose to it: {values}, {apart}."
        return Verdict("level", level)
    if nats > 0:
        return Verdict("better", f"Beats {against}: {values}, {change:.1%} lower, {apart}.")
    return Verdict("worse", f"Does not beat {against}: {values}, {change:.1%} higher, {apart}.")
