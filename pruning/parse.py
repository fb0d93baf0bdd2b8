"""Reads all that `--metric` may be: a name, a file, a run, the release's tree, a formula."""

import re
from functools import cache
from pathlib import Path

from prunevolve.pruning.baselines import NAMED, find_metric
from prunevolve.pruning.formula import MAX_DEPTH
from prunevolve.pruning.json_file import parse_object, read_text
from prunevolve.pruning.masks import group_of
from prunevolve.pruning.metric import Criterion, Metric

SCHEMA = 1
"""Version of the files that hold a metric in the folder of a search, and of a pruned model."""

DEFAULT_GROUP = "row"
"""Comparison group of a metric that names none: the release's (Section 3 of its paper)."""


@cache
def named_metric(name: str) -> Criterion:
    """Return a metric of `NAMED` with its group."""
    return Criterion.parse(NAMED[name].text, NAMED[name].group)


def read_tree(tree: object) -> Metric:
    """Read a metric from the release's tree: `{"data": name, "left": {...}, "right": {...}}`.

    Raises ValueError as `Metric.parse`, or if a node is something else.
    """
    return Metric.parse(_spelled(tree, MAX_DEPTH))


def _spelled(tree: object, levels: int) -> str:
    """Return the text of a release's tree of at most so many levels below its root."""
    sides = ("left", "right")[: len(tree) - 1] if isinstance(tree, dict) else ()
    match tree:
        case {"data": str(name), **operands} if operands.keys() == set(sides) and levels >= 0:
            if re.fullmatch(r"[\w.+-]+", name, re.ASCII):
                inner = ", ".join(_spelled(operands[side], levels - 1) for side in sides)
                return f"{name}({inner})" if sides else name
    node = '{"data": name, "left": {...}, "right": {...}}, a unary one with left alone'
    raise ValueError(f"metric: a tree must have nodes {node}, at most {MAX_DEPTH} levels deep")


def resolve_metric(argument: str) -> tuple[Criterion, str]:
    """Return the metric that a `--metric` argument means, and, if its file says so, what it was
    found on: models and sparsities, such as `embedded 60%`.

    A named metric comes first, then what is there under that path, then the formula. A file holds
    what a search or a pruning writes, a tree of the Pruner-Zero release (Dong et al., 2024,
    arXiv:2406.02924), or one formula as text; a folder is a run's or a pruned model's, and with a
    colon and a name behind it a row of the run's `hall_of_fame.csv`. The group is the named
    metric's or the file's, else `DEFAULT_GROUP`.
    """
    found = find_metric(argument)
    if isinstance(found, Path):
        return _from_file(found)
    text, group = found
    return Criterion.parse(text, group or DEFAULT_GROUP), ""


def read_metric(argument: str) -> Criterion:
    """Return the criterion that `resolve_metric` finds; raises as it does."""
    return resolve_metric(argument)[0]


def _from_file(path: Path) -> tuple[Criterion, str]:
    try:
        source = read_text(path)
        is_json = source.lstrip().startswith("{")
        content = parse_object(source, "it") if is_json else {"metric": source}
        if content.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, it is from another version")
        tree, text = content if "data" in content else content.get("tree"), content.get("metric")
        if not tree and not isinstance(text, str):
            raise ValueError("it has neither a string 'metric' nor a tree's 'data'")
        metric = Metric.parse(text) if isinstance(text, str) else read_tree(tree)
        if tree and read_tree(tree) != metric:
            raise ValueError("'metric' and 'tree' differ: remove the one that is not meant")
        group = group_of(content.get("group") or DEFAULT_GROUP).name
    except (OSError, ValueError) as error:
        raise ValueError(f"metric file {str(path)!r}: {error}") from error
    on = ""
    match content.get("provenance"):
        case {"tasks": [*tasks]}:
            on = ", ".join(str(task.get("name")) for task in tasks if isinstance(task, dict))
    return Criterion(metric.check_scores_weights(), group), on
