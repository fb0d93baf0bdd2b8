"""What came of a search, in one sentence: is the best found better than what has a name?"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

CLEAR = 2.0
"""Standard errors from which on a difference is no chance, as far as a single test can tell."""


def verdict_of(summary: Mapping[str, Any]) -> str:
    """Return the verdict on a finished run.

    Differences are paired over the windows of the report text, in nats per token, and of the best
    named metric there. The best found is a named metric under another spelling if both prune the
    same weights of every layer in every task.

    Args:
        summary: What `summary.json` holds, with its `tasks`.
    """
    tasks = summary["tasks"]
    if same := _same_as(tasks):
        best = _best_named(tasks[0])
        behind = "" if same == best else f", and {best} is better"
        return (
            f"the best found is {same} under another spelling: it prunes the same weights{behind}"
        )
    if len(tasks) == 1 and len(tasks[0]["by_text"]) == 1:
        return f"the best found {_of_one(tasks[0])}"
    return f"the best found {_of_several(tasks)}"


def _same_as(tasks: Sequence[Mapping[str, Any]]) -> str:
    """Return the named metric that has the same masks everywhere, or the empty string."""
    for name in tasks[0]["overlap"]:
        overlaps = [task["overlap"].get(name, {}) for task in tasks]
        if all(by_layer and set(by_layer.values()) == {1.0} for by_layer in overlaps):
            return str(name)
    return ""


def _of_one(task: Mapping[str, Any]) -> str:
    name = _best_named(task)
    named, found = task["baselines"][name], task["best"]["perplexity"]
    change = f"{abs(found / named - 1):.1%}"
    numbers = f"{found:.2f} against {named:.2f}"
    errors = _standard_errors(task)
    if errors is None:
        word = "below" if found < named else "above"
        return f"is {change} {word} the best named metric, {name}, in perplexity ({numbers})"
    numbers += f", {abs(errors):.1f} standard errors"
    if errors >= CLEAR:
        return f"beats the best named metric, {name}, by {change} of perplexity ({numbers})"
    if errors > -CLEAR:
        word = "better" if found < named else "worse"
        return (
            f"does not clearly beat the best named metric, {name}: its perplexity is {change} "
            f"{word}, which may be chance ({numbers})"
        )
    return (
        f"does not beat the best named metric, {name}: its perplexity is {change} worse ({numbers})"
    )


def _of_several(tasks: Sequence[Mapping[str, Any]]) -> str:
    cells = [cell["relative_rise"] for task in tasks for cell in task["by_text"]]
    errors = [_standard_errors(task) for task in tasks]
    clear = sum(one is not None and one >= CLEAR for one in errors)
    mean = fmean(cells)
    word = (
        "beats" if mean < 1 and clear else "does not clearly beat" if mean < 1 else "does not beat"
    )
    return (
        f"{word} the best named metrics: its rise over dense is {mean:.3f} of theirs, the mean "
        f"over {len(cells)} tasks and kinds of text, and it is {CLEAR:.0f} standard errors or "
        f"more ahead in {clear} of {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}"
    )


def _best_named(task: Mapping[str, Any]) -> str:
    baselines: Mapping[str, float] = task["baselines"]
    return min(baselines, key=lambda name: baselines[name])


def _standard_errors(task: Mapping[str, Any]) -> float | None:
    """Return by how many standard errors the best found is ahead; None if they are not known."""
    gap = task["behind_best"][_best_named(task)]
    error = gap["standard_error"]
    return gap["nats"] / error if error else None
