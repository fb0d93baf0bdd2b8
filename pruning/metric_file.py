"""What `--metric` may be: a name, a file or folder that holds a metric, or the formula itself.

Three kinds of file are read: `best_metric.json` as a search writes it, the bare JSON tree of the
Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924), and a text with one formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plain_files import parse_object, read_object, read_text
from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.masks import GROUPS
from pruning.metric import Metric
from pruning.names import metric_file

SCHEMA = 1
"""Version of `best_metric.json` and of `pruning_recipe.json`."""

MAX_BYTES = 2_000_000
"""Longest file that is read, so that a wrong path to a large file costs nothing."""

DEFAULT_GROUP = "row"
"""Comparison group of a metric that names none: the release's (Section 3 of its paper)."""


@dataclass(frozen=True)
class ResolvedMetric:
    """A metric with its comparison group, and where it was found, in one phrase."""

    criterion: Criterion
    source: str


def resolve_metric(argument: str) -> ResolvedMetric:
    """Return the metric that a `--metric` argument means.

    A named metric comes first, then what is there under that path, then the formula. A folder is
    a run's or a pruned model's. The group is the named metric's or the file's; `DEFAULT_GROUP`
    where neither says.

    Raises:
        ValueError: If the argument is none of them, the file is not one of the three kinds, or
            the metric cannot rank weights. The message is one line.
    """
    if argument in NAMED:
        return ResolvedMetric(NAMED[argument].criterion, f"baseline {argument}")
    path = metric_file(argument)
    resolved = _from_file(path) if path else _resolved(Metric.parse(argument), "formula")
    resolved.criterion.metric.check_scores_weights()
    return resolved


def read_metric(argument: str) -> Criterion:
    """Return what `resolve_metric` does, the criterion alone; raises as it does."""
    return resolve_metric(argument).criterion


def _resolved(metric: Metric, source: str, group: str = DEFAULT_GROUP) -> ResolvedMetric:
    return ResolvedMetric(Criterion(metric, group), source)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a regular file of at most `MAX_BYTES`.

    Raises:
        ValueError: If the file is none, is longer, is no UTF-8 JSON, is nested too deeply, or holds
            something else than an object.
        OSError: If it cannot be read.
    """
    return read_object(path, MAX_BYTES)


def _from_file(path: Path) -> ResolvedMetric:
    try:
        text = read_text(path, MAX_BYTES)
    except OSError as error:
        raise ValueError(f"metric file {str(path)!r} cannot be read: {error.strerror}") from error
    source = f"file {path.name}"
    if not text.lstrip().startswith("{"):
        return _resolved(Metric.parse(text), source)
    content = parse_object(text, f"file {str(path)!r}")
    if "data" in content:
        return _resolved(Metric.from_release_json(content), source)
    try:
        return _resolved(_metric_of(content), source, _group_of(content))
    except ValueError as error:
        raise ValueError(f"metric file {str(path)!r}: {error}") from error


def _metric_of(content: Mapping[str, Any]) -> Metric:
    if not isinstance(content.get("metric"), str):
        raise ValueError("it has neither a string 'metric' nor a tree's 'data'")
    if content.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(
            f"schema must be {SCHEMA}, got {content['schema']!r:.40}: it is from another version"
        )
    metric = Metric.parse(content["metric"])
    if "tree" in content and Metric.from_release_json(content["tree"]) != metric:
        raise ValueError("'metric' and 'tree' differ: remove the one that is not meant")
    return metric


def _group_of(content: Mapping[str, Any]) -> str:
    group = content.get("group")
    if group is None:
        return DEFAULT_GROUP
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r:.40}")
    return str(group)
