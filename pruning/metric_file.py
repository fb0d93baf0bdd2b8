"""What `--metric` may be: a name, a file or folder that holds a metric, or the formula itself.

Three kinds of file are read: `best_metric.json` as a search writes it, the bare JSON tree of the
Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924), and a text with one formula.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from prunevolve.pruning.baselines import NAMED, SPARSEGPT
from prunevolve.pruning.json_file import JsonObject, parse_object, read_text
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.metric import Criterion, Metric

SCHEMA = 1
"""Version of `best_metric.json` and of `pruning_recipe.json`."""

FORMS = (
    f"give one of {', '.join(NAMED)}, a file, a run folder, or a formula such as mul(W, sqrt(X))"
)

METRIC_FILES = ("best_metric.json", "pruning_recipe.json")
"""What holds a metric in the folder of a search, and of a pruned model."""

_PATH = re.compile(r"[/\\~]|\.(json|txt)$")

DEFAULT_GROUP = "row"
"""Comparison group of a metric that names none: the release's (Section 3 of its paper)."""


@dataclass(frozen=True)
class ResolvedMetric:
    """A metric with its comparison group, where it is from, and what a search found it on.

    Attributes:
        source: The kind of place, such as `baseline wanda`.
        found_on: Models and sparsities, such as `embedded at 60%`; empty if that is not known.
    """

    criterion: Criterion
    source: str
    found_on: str = ""


def resolve_metric(argument: str) -> ResolvedMetric:
    """Return the metric that a `--metric` argument means.

    A named metric comes first, then what is there under that path, then the formula. A folder is
    a run's or a pruned model's. The group is the named metric's or the file's; `DEFAULT_GROUP`
    where neither says. `sparsegpt` stands for the score that the method begins with.

    Raises:
        ValueError: If the argument is none of them, the file is not one of the three kinds, or
            the metric cannot rank weights. The message is one line.
    """
    if argument == SPARSEGPT:
        return ResolvedMetric(NAMED["sparsegpt-score"].criterion, "method sparsegpt")
    if argument in NAMED:
        return ResolvedMetric(NAMED[argument].criterion, f"baseline {argument}")
    path = _file_of(argument)
    resolved = _from_file(path) if path else _resolved(Metric.parse(argument), "formula")
    resolved.criterion.metric.check_scores_weights()
    return resolved


def read_metric(argument: str) -> Criterion:
    """Return what `resolve_metric` does, the criterion alone; raises as it does."""
    return resolve_metric(argument).criterion


def _resolved(metric: Metric, source: str) -> ResolvedMetric:
    return ResolvedMetric(Criterion(metric, DEFAULT_GROUP), source)


def _file_of(argument: str) -> Path | None:
    """Return the file that a metric is to be read from; None for a formula.

    A folder stands for what a search or a pruning wrote into it.

    Raises:
        ValueError: If the argument is a path to nothing, a folder of something else, or a word that
            is no metric's name.
    """
    if place := existing(argument):
        if not place.is_dir():
            return place
        if found := next((place / name for name in METRIC_FILES if (place / name).is_file()), None):
            return found
        raise ValueError(
            f"metric {argument!r} is a folder without {METRIC_FILES[0]}, which a search writes at "
            f"its end: {FORMS}"
        )
    if _PATH.search(argument) and not _is_like_a_formula(argument):
        raise ValueError(
            f"metric {argument[:200]!r} looks like a file and there is no such file: {FORMS}"
        )
    # A single letter is a leaf, or the language says which ones there are.
    if re.fullmatch(r"[\w-]{2,}", argument):
        near = difflib.get_close_matches(argument[:40].lower(), NAMED, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        raise ValueError(f"metric {argument[:200]!r} is no known name: {guess}{FORMS}")
    return None


def _is_like_a_formula(argument: str) -> bool:
    """Tell whether all words are capital letters or stand before a bracket: no path's do."""
    rest = re.sub(r"\b[A-Z]\b|\b\w+\s*\(|\b\d[\d.]*(e[-+]?\d+)?\b", " ", argument)
    return not re.search(r"[\w~\\\0]", rest)


def existing(argument: str) -> Path | None:
    """Return the path that an argument names if there is something; None otherwise."""
    try:
        path = Path(argument).expanduser()
        return path if argument and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home


def _from_file(path: Path) -> ResolvedMetric:
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"metric file {str(path)!r} cannot be read: {error.strerror}") from error
    source = f"file {path.name}"
    if not text.lstrip().startswith("{"):
        return _resolved(Metric.parse(text), source)
    content = parse_object(text, f"file {str(path)!r}")
    if "data" in content:
        return _resolved(Metric.from_release_json(content), source)
    try:
        criterion = Criterion(_metric_of(content), _group_of(content))
        return ResolvedMetric(criterion, source, _found_on(content))
    except ValueError as error:
        raise ValueError(f"metric file {str(path)!r}: {error}") from error


def _metric_of(content: JsonObject) -> Metric:
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


def _found_on(content: JsonObject) -> str:
    match content.get("provenance"):
        case {"found": {"models": [*models], "removed": [*removed]}}:
            return f"{', '.join(map(str, models))} at {', '.join(map(str, removed))}"
    return ""


def _group_of(content: JsonObject) -> str:
    group = content.get("group")
    if group is None:
        return DEFAULT_GROUP
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r:.40}")
    return str(group)
