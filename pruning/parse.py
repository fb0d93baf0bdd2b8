"""Reads metrics: nested calls, lines of mathematics, the release's tree, all `--metric` may be.

Text is parsed by `ast` and never evaluated.
"""

import ast
import csv
import difflib
import re
from functools import partial
from pathlib import Path
from typing import Never

from prunevolve.pruning.baselines import NAMED, SPARSEGPT
from prunevolve.pruning.infix import POWERS
from prunevolve.pruning.json_file import JsonObject, parse_object, read_text
from prunevolve.pruning.masks import group_of
from prunevolve.pruning.metric import Criterion, Metric, interned
from prunevolve.pruning.operators import OPERATORS, POWER
from prunevolve.pruning.statistics import TERMINALS

MAX_DEPTH = 32
"""Deepest metric that is read, root at depth 0; a search's own limit is far lower."""

MAX_CHARACTERS = 20_000
"""Longest text that is read, so that hostile input costs nothing."""

SCHEMA = 1
"""Version of the files that hold a metric in the folder of a search, and of a pruned model."""

DEFAULT_GROUP = "row"
"""Comparison group of a metric that names none: the release's (Section 3 of its paper)."""

_FORMULA = "a formula is such as W * sqrt(X), or as calls mul(W, sqrt(X))"
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_FOREIGN = re.compile(r"[^\w\s(),.+*/^|·−√∜²³-]", re.ASCII)

_PYTHON = str.maketrans(
    {"·": "*", "−": "-", "^": "**", "²": "**2", "³": "**3", "√": "~", "∜": "~~"}
)
"""Signs of a line of mathematics as Python's; `~`, too, binds tighter than a product."""

_SIGNS: dict[type[ast.AST], str] = {
    **{ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "quot", ast.Pow: POWER},
    **{ast.USub: "neg", ast.Invert: "sqrt"},
}


def read_formula(text: str) -> Metric:
    """Return the metric that a text spells; raises ValueError as `Metric.parse` does."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"metric {text[:40]!r}... is longer than {MAX_CHARACTERS} characters")
    text = " ".join(text.split())
    if foreign := _FOREIGN.search(text):
        _refuse(text, foreign.start(), f"{foreign.group()!r} is not in the language; {_FORMULA}")
    text = re.sub(r"\|([^|]*)\|", r"abs(\1)", text.translate(_PYTHON))
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        is_open = "was never closed" in str(error)
        problem = "missing )" if is_open else f"this is malformed; {_FORMULA}"
        _refuse(text, (getattr(error, "offset", None) or 1) - 1, problem)
    metric = _from_ast(tree, text, depth=0)
    if metric.depth > MAX_DEPTH:  # a power may be two operators
        _refuse(text, 0, f"this is deeper than {MAX_DEPTH} levels")
    return metric


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
    """Return the metric that a `--metric` argument means, and what it was found on.

    The latter are models and sparsities, such as `embedded at 60%`, if its file says so.

    A named metric comes first, then what is there under that path, then the formula. A file holds
    what a search or a pruning writes, a tree of the Pruner-Zero release (Dong et al., 2024,
    arXiv:2406.02924), or one formula as text; a folder is a run's or a pruned model's, and with a
    colon and a name behind it a row of the run's `hall_of_fame.csv`. The group is
    the named metric's or the file's, else `DEFAULT_GROUP`. `sparsegpt` stands for the score that
    the method begins with.

    Raises:
        ValueError: If the argument or the file is none of these, or the metric cannot rank weights.
    """
    if argument == SPARSEGPT:
        return NAMED["sparsegpt-score"].criterion, ""
    if argument in NAMED:
        return NAMED[argument].criterion, ""
    path = existing(argument)
    if not path and (row := _row_of_run(*argument.rpartition(":")[::2])):
        return row, ""
    if path and path.is_dir():
        files = (path / name for name in ("best_metric.json", "pruning_recipe.json"))
        path = next((file for file in files if file.is_file()), None)
        if not path:
            rule = "best_metric.json, which a run has once a candidate is evaluated"
            raise ValueError(
                f"metric {argument!r} is a folder without {rule}, or a pruning_recipe.json"
            )
    words = set(re.findall(r"[A-Za-z_]\w*", argument))
    signs = re.search(r"[(^*+|·−√∜²³]", argument)  # that few paths have
    if not path and not signs and not words <= TERMINALS.keys():
        names = [*NAMED, SPARSEGPT]
        near = difflib.get_close_matches(argument[:40].lower(), names, n=1)
        guess = f"did you mean {near[0]}? or " if near else ""
        forms = f"give one of {', '.join(names)}, a file, a run folder, or a formula; {_FORMULA}"
        raise ValueError(f"metric {argument[:200]!r} is no known name or file: {guess}{forms}")
    if path:
        criterion, found_on = _from_file(path)
    else:
        criterion, found_on = Criterion(Metric.parse(argument), DEFAULT_GROUP), ""
    criterion.metric.check_scores_weights()
    return criterion, found_on


def _row_of_run(folder: str, name: str) -> Criterion | None:
    """Return the metric of a name in a run's hall of fame; None if there is no such run."""
    path = existing(folder)
    if not path or not (table := path / "hall_of_fame.csv").is_file():
        return None
    rows = {row.get("name"): row for row in csv.DictReader(read_text(table).splitlines())}
    if name not in rows:
        known = ", ".join(map(str, rows))
        raise ValueError(f"metric {name!r} is not in {table}: give one of {known}")
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
        text = read_text(path)
        is_json = text.lstrip().startswith("{")
        content = parse_object(text, "it") if is_json else {"metric": text}
        criterion = _criterion_of(content)
    except (OSError, ValueError) as error:
        raise ValueError(f"metric file {str(path)!r}: {error}") from error
    found_on = ""
    match content.get("provenance"):
        case {"found": {"models": [*models], "removed": [*removed]}}:
            found_on = f"{', '.join(map(str, models))} at {', '.join(map(str, removed))}"
    return criterion, found_on


def _criterion_of(content: JsonObject) -> Criterion:
    if content.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, it is from another version")
    tree, text = content if "data" in content else content.get("tree"), content.get("metric")
    if not tree and not isinstance(text, str):
        raise ValueError("it has neither a string 'metric' nor a tree's 'data'")
    metric = Metric.parse(text) if isinstance(text, str) else read_tree(tree)
    if tree and read_tree(tree) != metric:
        raise ValueError("'metric' and 'tree' differ: remove the one that is not meant")
    return Criterion(metric, group_of(content.get("group") or DEFAULT_GROUP).name)


def _refuse(text: str, place: int, problem: str) -> Never:
    excerpt = text[max(0, place - 30) : place + 30]
    raise ValueError(f"metric '{excerpt}', at column {place + 1}: {problem}")


def _from_ast(node: ast.expr, text: str, depth: int) -> Metric:
    refuse = partial(_refuse, text, node.col_offset)
    if depth > MAX_DEPTH:
        refuse(f"this is deeper than {MAX_DEPTH} levels")
    # The text is ASCII by now, so the parser's byte offsets count characters.
    written = text[node.col_offset : node.end_col_offset]
    if _NUMBER.fullmatch(written):
        return Metric.constant(float(written))
    name, operands = _operation(node)
    if not name:
        refuse(f"this is neither a call nor a terminal; {_FORMULA}")
    if name not in OPERATORS and name not in TERMINALS:
        near = difflib.get_close_matches(name[:40], [*TERMINALS, *OPERATORS], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        names = (
            f"terminals are {', '.join(TERMINALS)} and numbers, operators {', '.join(OPERATORS)}"
        )
        refuse(f"{name[:40]!r} is unknown: {guess}{names}")
    arity = OPERATORS[name].arity if name in OPERATORS else 0
    if len(operands) != arity:
        refuse(f"{name} takes {arity} operand(s), not {len(operands)}")
    read = tuple(_from_ast(x, text, depth + 1) for x in operands)
    if isinstance(node, ast.BinOp) and name == POWER and read[1].is_constant:
        return _power(read[0], read[1].value)
    return interned(name, read)


def _operation(node: ast.expr) -> tuple[str, list[ast.expr]]:
    """Return the operator or terminal that a node means, and its operands; no name of others."""
    match node:
        case ast.Name(name):
            return name, []
        case ast.Call(ast.Name(name), [_, *_] as operands, []):
            return name, operands
        case ast.UnaryOp(ast.Invert(), ast.UnaryOp(ast.Invert(), x)):
            return "root4", [x]
        case ast.UnaryOp(sign, x):
            return _SIGNS.get(type(sign), ""), [x]
        case ast.BinOp(x, ast.Div(), ast.Call(ast.Name("norm" | "rms" as norm), [y])):
            return {"norm": "div", "rms": "divrms"}[norm], [x, y]
        case ast.BinOp(x, sign, y):
            return _SIGNS.get(type(sign), ""), [x, y]
    return "", []


def _power(x: Metric, exponent: float) -> Metric:
    """Return x ** c, of |x| unless c is odd."""
    if exponent == 1:
        return x
    if exponent % 2 == 1 and exponent != 3 and not x.never_negative:
        return interned("mul", (x, _power(x, exponent - 1)))
    named = next((name for name, c in POWERS.items() if c == exponent), None)
    return interned(named, (x,)) if named else interned(POWER, (x, Metric.constant(exponent)))
