"""Pruning metrics with names, and what else `--metric` names: a file, a run's row, or a formula.

All are texts, so that a name that is nothing is refused before torch is imported, which takes
seconds.
"""

import csv
import difflib
import re
from pathlib import Path
from typing import NamedTuple

from prunevolve.pruning.json_file import read_text

FORMS = "a formula is such as W * sqrt(X), or as calls mul(W, sqrt(X))"


class Baseline(NamedTuple):
    """A named metric's text with its comparison group, and where it was published."""

    text: str
    group: str
    source: str


_RELATIVE = "add(quot(W, colsum(W)), quot(W, rowsum(W)))"
_NORMED = "add(quot(W, colnorm(W)), quot(W, rownorm(W)))"
_MEAN, _ROWS = "colmean(quot(M, G))", "rowmean(quot(M, G))"
_DIRECTION = f"exp(mul(0.2, divrms({_MEAN}, {_MEAN})))"
_BOTH = f"mul({_DIRECTION}, exp(mul(0.1, divrms({_ROWS}, {_ROWS}))))"
_MEANS = "mul(add(rowmean(W), colmean(W)), rowmean(sqrt(X)))"
_DEVIATION = "mul(power(mul(W, G), 1.3), mul(W, quot(sqrt(V), rowmean(sqrt(X)))))"

_WANDA = "Sun et al., 2024, arXiv:2306.11695"
_RIA = "Zhang et al., 2024, arXiv:2402.12354"
_GBLM = "Das et al., 2024, arXiv:2311.04902"
_SYMWANDA = "Yi and Richtarik, 2025, arXiv:2501.18980"
_FLAP = "An et al., 2024, arXiv:2312.11983"

# All metrics that can be given by name; the last two came out of this project's searches.
NAMED: dict[str, Baseline] = {
    "magnitude": Baseline("W", "layer", "Han et al., 2015, arXiv:1506.02626"),
    "wanda": Baseline("mul(W, sqrt(X))", "row", f"{_WANDA}, Section 3"),
    "ria": Baseline(f"mul({_RELATIVE}, root4(X))", "row", f"{_RIA}; exponent 0.5"),
    "gblm": Baseline("mul(W, add(G, sqrt(X)))", "row", _GBLM),
    "snip": Baseline("mul(W, G)", "model", "Lee et al., 2019, arXiv:1810.02340"),
    "pruner-zero": Baseline(
        "mul(abs(mul(W, W)), mms(G))", "row", "Dong et al., 2024, arXiv:2406.02924"
    ),
    "relative-importance": Baseline(_RELATIVE, "row", f"{_RIA}; exponent 0: no activations"),
    "ria-full": Baseline(f"mul({_RELATIVE}, sqrt(X))", "row", f"{_RIA}; exponent 1"),
    "gblm-gradient": Baseline("mul(W, G)", "row", f"{_GBLM}; only its gradient term"),
    "gblm-alpha-10": Baseline(
        "mul(W, add(mul(0.1, G), sqrt(X)))",
        "row",
        f"{_GBLM}; alpha 10, where `gblm` has G's factor, 100",
    ),
    "wanda-root": Baseline("mul(W, root4(X))", "row", f"{_WANDA}, with the exponent of `ria`"),
    "symwanda": Baseline(
        "mul(W, sqrt(add(X, sqr(B))))", "row", f"{_SYMWANDA}; the output side is B here"
    ),
    "symwanda-l2": Baseline(
        f"mul({_NORMED}, root4(X))", "row", f"{_SYMWANDA}; relative importance by L2 norms"
    ),
    "movement": Baseline(
        "mul(W, M)", "model", "Sanh et al., 2020, arXiv:2005.07683, Section 4; without training"
    ),
    "sparsegpt-score": Baseline(
        "quot(sqr(W), H)",
        "layer",
        "Frantar and Alistarh, 2023, arXiv:2301.00774, Section 3; without changing kept weights",
    ),
    "wifv": Baseline("mul(V, sqr(W))", "row", f"{_FLAP}; FLAP's, of each weight"),
    # Of neurons: the score of one is the sum over the weights that take its output, or over all.
    "wanda-sp": Baseline("mul(sqr(W), X)", "outputs", f"{_FLAP}: Wanda's, of a neuron"),
    "flap": Baseline("mul(V, sqr(W))", "outputs", f"{_FLAP}, Section 3"),
    "taylor": Baseline(
        "mul(W, M)", "outputs", "Molchanov et al., 2019, arXiv:1906.10771; without training"
    ),
    "fisher": Baseline(
        "sqr(mul(W, G))", "layer", "Ma et al., 2023, arXiv:2305.11627; the diagonal of Fisher's"
    ),
    "directed-snip-wanda": Baseline(
        f"quot(mul({_DIRECTION}, mul(sqr(W), mul(G, sqrt(X)))), {_MEANS})",
        "model",
        "this project, 2026",
    ),
    "directed-snip-deviation": Baseline(
        f"mul({_BOTH}, quot({_DEVIATION}, sqrt(mul(rowmean(W), colmean(W)))))",
        "model",
        "this project, 2026",
    ),
}

# Those that every report measures beside what a search found; the second where neurons go.
BASELINES = ("magnitude", "wanda", "ria", "gblm", "snip", "pruner-zero")
NEURON_BASELINES = ("magnitude", "wanda-sp", "flap", "fisher", "taylor", "snip")

# The method that is no metric alone: it changes weights while it chooses (`pruning.sparsegpt`).
SPARSEGPT = "sparsegpt"


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
