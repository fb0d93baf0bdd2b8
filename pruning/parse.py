"""Reads all that `--metric` may be: a name, a file, a run, the release's tree, a formula."""

import csv
import difflib
import re
from functools import cache
from pathlib import Path

from prunevolve.pruning.baselines import NAMED, SPARSEGPT
from prunevolve.pruning.formula import FORMS, MAX_DEPTH
from prunevolve.pruning.json_file import parse_object, read_text
from prunevolve.pruning.masks import group_of
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.statistics import TERMINALS

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
    name = "sparsegpt-score" if argument == SPARSEGPT else argument  # what the method begins with
    if name in NAMED:
        return named_metric(name), ""
    path = existing(argument)
    if not path and (row := _row_of_run(*argument.rpartition(":")[::2])):
        return row, ""
    if path and path.is_dir():
        files = (path / name for name in ("best_metric.json", "pruning_recipe.json"))
        path = next((file for file in files if file.is_file()), None)
        if not path:
            either = "best_metric.json, which a run has once a candidate is evaluated"
            neither = f"without {either}, or a pruning_recipe.json"
            raise ValueError(f"metric {argument!r} is a folder {neither}")
    if path:
        return _from_file(path)
    words = set(re.findall(r"[A-Za-z_]\w*", argument))
    signs = re.search(r"[(^*+|·−√∜²³]", argument)  # that few paths have
    if not signs and not words <= TERMINALS.keys():
        names = [*NAMED, SPARSEGPT]
        near = difflib.get_close_matches(argument[:40].lower(), names, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        forms = f"give one of {', '.join(names)}, a file, a run folder, or a formula; {FORMS}"
        raise ValueError(f"metric {argument[:200]!r} is no known name or file: {guess}{forms}")
    return Criterion.parse(argument, DEFAULT_GROUP), ""


def _row_of_run(folder: str, name: str) -> Criterion | None:
    """Return the metric of a name in a run's hall of fame; None if there is no such run."""
    path = existing(folder)
    if not path or not (table := path / "hall_of_fame.csv").is_file():
        return None
    rows = {row.get("name"): row for row in csv.DictReader(read_text(table).splitlines())}
    if name not in rows:
        names = ", ".join(map(str, rows))
        raise ValueError(f"metric {name!r} is not in {table}: give one of {names}")
    return Criterion.parse(rows[name]["metric"], rows[name]["group"])


def read_metric(argument: str) -> Criterion:
    """Return the criterion that `resolve_metric` finds; raises as it does."""
    return resolve_metric(argument)[0]


def existing(argument: str) -> Path | None:
    """Return the path that an argument names if there is something; None otherwise."""
    try:
        path = Path(argument).expanduser()
        return path if argument and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home


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
