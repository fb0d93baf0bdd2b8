"""The syntax of metrics: text and the release's JSON to plain trees of names, and numbers.

A tree is a pair of a name and its operands' trees. Text is read with the `ast` module and never
evaluated as Python; whatever is neither in the language's tables nor a number is refused.
"""

import ast
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, Never

import numpy as np

from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import LEAVES

Tree = tuple[str, tuple["Tree", ...]]

MAX_DEPTH = 32
"""Deepest metric that is read, root at depth 0; a search's own limit is far lower."""

MAX_CHARACTERS = 20_000
"""Longest text that is read, so that hostile input costs nothing."""

MAGNITUDES = (1e-37, 1e38)
"""Smallest and largest magnitude of a number other than 0: where fp32 has full precision."""

_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.)]){_NUMBER.pattern}(?![\w.])")
_OUTSIDE_THE_LANGUAGE = re.compile(r"[^A-Za-z0-9_(),\s]")


def read_text(text: str) -> Tree:
    """Return the tree of a text; raises ValueError as `Metric.parse` does."""
    text = _checked_line(text)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        _refuse(text, error.offset or 1, "is not a well-formed formula", "")
    except (RecursionError, MemoryError):
        # From thousands of nested `not`, or of calls of a call's result.
        _refuse(text, 1, "is deeper than the parser goes", "")
    return _from_ast(tree, text)


def read_json(mapping: Any, path: str = "tree", depth: int = 0) -> Tree:
    """Return the tree of a release's tree; raises ValueError as `Metric.from_release_json` does."""

    def refuse(problem: str, way_out: str = "") -> Never:
        raise ValueError(f"metric file: {path} {problem}{way_out}")

    if depth > MAX_DEPTH:
        refuse(f"is deeper than {MAX_DEPTH} levels")
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("data"), str):
        refuse('is not a node: write {"data": name, "left": {...}, "right": {...}}')
    if foreign := sorted(set(mapping) - {"data", "left", "right"}, key=str):
        refuse(f"has the unknown key {str(foreign[0])[:40]!r}: a node has data, left and right")
    name = mapping["data"]
    if name in LEAVES or _NUMBER.fullmatch(name):
        if len(mapping) > 1:
            refuse(f"gives the leaf {name[:40]} an operand: a leaf has none")
        return (name if name in LEAVES else _read_number(name, refuse)), ()
    if name not in OPERATORS:
        refuse(*_unknown(name, "operator or leaf"))
    sides = [side for side in ("left", "right") if side in mapping]
    _check_arity(name, len(sides), refuse)
    if sides[0] != "left":
        refuse(f"gives {name} a right operand only: a unary node has 'left'")
    return name, tuple(read_json(mapping[side], f"{path}.{side}", depth + 1) for side in sides)


def is_number(value: float) -> bool:
    """Whether a number is in the language: 0, or a magnitude within `MAGNITUDES`."""
    return value == 0 or MAGNITUDES[0] <= abs(value) <= MAGNITUDES[1]


def number_text(value: float) -> str:
    """Return the shortest text that reads back as the same fp32 number.

    Raises:
        ValueError: If the magnitude is neither 0 nor within `MAGNITUDES`.
    """
    if not is_number(value):
        smallest, largest = MAGNITUDES
        raise ValueError(
            f"the number {value:.6g}: its magnitude must be 0 or from {smallest} to {largest}"
        )
    wanted = np.float32(value)
    for digits in range(1, 9):
        text = f"{wanted:.{digits}g}"
        if np.float32(text) == wanted:
            break
    else:
        text = f"{wanted:.9g}"  # nine digits tell any two fp32 numbers apart
    return text.removeprefix("-") if value == 0 else text


def _checked_line(text: str) -> str:
    """Return the text on one line; refuse what no metric contains before the parser sees it."""
    if len(text) > MAX_CHARACTERS:
        start = " ".join(text[:40].split())
        raise ValueError(
            f"metric '{start}...' has {len(text)} characters: at most {MAX_CHARACTERS} are read"
        )
    text = " ".join(text.split())
    if not text:
        raise ValueError("metric '' is empty: write a formula such as mul(W, sqrt(X))")
    # Points and signs occur only in numbers: once the numbers are blanked, none may be left.
    blanked = _NUMBER_IN_TEXT.sub(lambda number: "0" * len(number.group()), text)
    if foreign := _OUTSIDE_THE_LANGUAGE.search(blanked):
        way_out = "; a formula is nested calls, such as mul(W, sqrt(X))"
        _refuse(text, foreign.start() + 1, f"has {foreign.group()!r}", way_out)
    depth = 0
    for column, character in enumerate(text, 1):
        depth += (character == "(") - (character == ")")
        if depth > MAX_DEPTH:
            _refuse(text, column, f"is deeper than {MAX_DEPTH} levels", "")
    return text


def _refuse(text: str, column: int, problem: str, way_out: str) -> Never:
    start = max(0, column - 30)
    excerpt = ("..." if start else "") + text[start : column + 30].strip()
    excerpt += "..." if column + 30 < len(text) else ""
    raise ValueError(f"metric '{excerpt}' {problem} at column {column}{way_out}")


def _from_ast(node: ast.expr, text: str) -> Tree:
    def refuse(problem: str, way_out: str = "") -> Never:
        _refuse(text, node.col_offset + 1, problem, way_out)

    if isinstance(node, ast.Name):
        if node.id not in LEAVES:
            refuse(*_unknown(node.id, "leaf"))
        return node.id, ()
    # The text is ASCII by now, so the parser's byte offsets count characters.
    written = text[node.col_offset : node.end_col_offset]
    if _NUMBER.fullmatch(written):
        return _read_number(written, refuse), ()
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        refuse("has something that is neither an operator call nor a leaf", _vocabulary())
    if node.func.id not in OPERATORS:
        refuse(*_unknown(node.func.id, "operator"))
    _check_arity(node.func.id, len(node.args), refuse)
    return node.func.id, tuple(_from_ast(argument, text) for argument in node.args)


def _read_number(written: str, refuse: Callable[[str], Never]) -> str:
    try:
        return number_text(float(written))
    except ValueError as error:
        refuse(f"has {error}")


def _check_arity(name: str, given: int, refuse: Callable[[str], Never]) -> None:
    if given != OPERATORS[name].arity:
        refuse(f"gives {name} {given} operand(s), and it takes {OPERATORS[name].arity}")


def _unknown(name: str, kind: str) -> tuple[str, str]:
    others = [other for other in (*LEAVES, *OPERATORS) if other != name]
    near = difflib.get_close_matches(name[:40], others, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"has the unknown {kind} {name[:40]!r}", f"{guess}{_vocabulary()}"


def _vocabulary() -> str:
    return f"; leaves are {', '.join(LEAVES)} and numbers, operators {', '.join(OPERATORS)}"
