"""What `--metric` names: a named metric, a file, a run's row, or a formula.

None of this imports torch, which takes seconds: a name that is nothing is refused before.
"""

import csv
import difflib
import re
from pathlib import Path

from prunevolve.pruning.baselines import NAMED, SPARSEGPT
from prunevolve.pruning.json_file import read_text

FORMS = "a formula is such as W * sqrt(X), or as calls mul(W, sqrt(X))"


def find_metric(argument: str) -> tuple[str, str | None] | Path:
    """Return a metric's text, with its group if that is known, or the file that holds it.

    See `pruning.parse.resolve_metric`. Raises ValueError for what can be neither name nor formula.
    """
    name = "sparsegpt-score" if argument == SPARSEGPT else argument  # what the method begins with
    if name in NAMED:
        return NAMED[name].text, NAMED[name].group
    path = existing(argument)
    if not path and (row := _row_of_run(*argument.rpartition(":")[::2])):
        return row
    if path and path.is_dir():
        files = (path / name for name in ("best_metric.json", "pruning_recipe.json"))
        path = next((file for file in files if file.is_file()), None)
        if not path:
            either = "best_metric.json, which a run has once a candidate is evaluated"
            neither = f"without {either}, or a pruning_recipe.json"
            raise ValueError(f"metric {argument!r} is a folder {neither}")
    if path:
        return path
    signs = re.search(r"[(^*+|·−√∜²³]", argument)  # that few paths have
    if not signs and not re.fullmatch(r"\W*[A-Z](\W+[A-Z])*\W*", argument, re.ASCII):  # terminals
        names = [*NAMED, SPARSEGPT]
        near = difflib.get_close_matches(argument[:40].lower(), names, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        forms = f"give one of {', '.join(names)}, a file, a run folder, or a formula; {FORMS}"
        raise ValueError(f"metric {argument[:200]!r} is no known name or file: {guess}{forms}")
    return argument, None


def _row_of_run(folder: str, name: str) -> tuple[str, str] | None:
    """Return metric and group of a name in a run's hall of fame; None if there is no such run."""
    path = existing(folder)
    if not path or not (table := path / "hall_of_fame.csv").is_file():
        return None
    rows = {row.get("name"): row for row in csv.DictReader(read_text(table).splitlines())}
    if name not in rows:
        names = ", ".join(map(str, rows))
        raise ValueError(f"metric {name!r} is not in {table}: give one of {names}")
    return rows[name]["metric"], rows[name]["group"]


def existing(argument: str) -> Path | None:
    """Return the path that an argument names if there is something; None otherwise."""
    try:
        path = Path(argument).expanduser()
        return path if argument and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home
