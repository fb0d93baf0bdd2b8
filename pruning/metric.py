"""The metric language: text in, tree out, and back; the release's JSON in and out.

A metric is a formula over the leaves W, G and X, written as nested calls of the operators in
`pruning.operators`: `mul(abs(mul(W, W)), mms(G))`. Text is read with the `ast` module and never
evaluated as Python.
"""

import ast
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor

from pruning.operators import LEAVES, RELEASE

MAX_DEPTH = 32
"""Deepest metric that is read, root at depth 0; a search's own limit is far lower."""

MAX_CHARACTERS = 20_000
"""Longest text that is read, so that hostile input costs nothing."""

_OUTSIDE_THE_LANGUAGE = re.compile(r"[^A-Za-z0-9_(),\s]")


@dataclass(frozen=True)
class Metric:
    """A formula that scores every weight of a matrix; weights with low scores are pruned.

    Attributes:
        name: The operator or leaf at the root.
        operands: The metrics that the operator is applied to; empty for a leaf.
    """

    name: str
    operands: tuple["Metric", ...] = ()

    @staticmethod
    def parse(text: str) -> "Metric":
        """Read a metric from its text, such as `mul(W, sqrt(X))`.

        Raises:
            ValueError: If the text is anything but nested calls of known operators on W, G and X
                with the right number of operands, at most `MAX_DEPTH` deep. The message is one
                line that points at the place.
        """
        text = _checked_line(text)
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            _refuse(text, error.offset or 1, "is not a well-formed formula", "")
        except (RecursionError, MemoryError):
            # What the parser says to thousands of nested `not` or of calls of a call's result.
            _refuse(text, 1, "is deeper than the parser goes", "")
        return _from_ast(tree, text)

    @staticmethod
    def from_release_json(mapping: Mapping[str, Any]) -> "Metric":
        """Read a metric from the release's tree: `{"data": name, "left": {...}, "right": {...}}`.

        Raises:
            ValueError: If a node has another form, an unknown name, the wrong number of operands,
                or the tree is deeper than `MAX_DEPTH`. The message names the path to the node.
        """
        return _from_json(mapping, "tree", 0)

    def to_release_json(self) -> dict[str, Any]:
        """Return the release's tree; `from_release_json` gives this metric back, node for node."""
        sides = zip(("left", "right"), self.operands, strict=False)
        return {"data": self.name} | {side: operand.to_release_json() for side, operand in sides}

    @cached_property
    def text(self) -> str:
        """The metric as text; `parse` gives this metric back, node for node."""
        if not self.operands:
            return self.name
        return f"{self.name}({', '.join(operand.text for operand in self.operands)})"

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The statistics that the metric names: a subset of {"W", "G", "X"}."""
        return frozenset(node.name for node in self.nodes() if not node.operands)

    @cached_property
    def size(self) -> int:
        """Number of nodes, leaves included."""
        return 1 + sum(operand.size for operand in self.operands)

    @cached_property
    def depth(self) -> int:
        """Longest way from the root to a leaf; a single leaf has depth 0."""
        return 1 + max(operand.depth for operand in self.operands) if self.operands else 0

    @cached_property
    def varies_by_row(self) -> bool:
        """Whether rows can be ranked differently: False for a score made of X alone.

        The right operand of `div` counts only as a number, so `div(X, W)` ranks like X.
        """
        if not self.operands:
            return self.name != "X"
        deciding = self.operands[:1] if RELEASE[self.name].shapes_by == "left" else self.operands
        return any(operand.varies_by_row for operand in deciding)

    def nodes(self) -> Iterator["Metric"]:
        """Yield every node in prefix order, as DEAP stores a tree."""
        yield self
        for operand in self.operands:
            yield from operand.nodes()

    def check_scores_weights(self) -> "Metric":
        """Return this metric if it can rank the weights of one row against another's.

        Raises:
            ValueError: If its score is the same in every row, whatever the weights.
        """
        if not self.varies_by_row:
            raise ValueError(
                f"metric '{self.text}' gives every row the same scores: a metric must use W or G "
                "other than as the divisor of div; for example mul(W, sqrt(X))"
            )
        return self

    def score(self, W: Tensor | None, G: Tensor | None, X: Tensor | None) -> Tensor:
        """Score every weight of one matrix; low scores are pruned.

        Args:
            W: Absolute weights, (out_features, in_features).
            G: Gradient statistic, (out_features, in_features).
            X: Activation statistic, squared norms, (1, in_features).
                Each is cast to fp32 and may be None if the metric does not name it.

        Returns:
            Scores in fp32, (out_features, in_features), or (1, in_features) for a formula of X
            alone. They may be non-finite: the masks refuse that.

        Raises:
            ValueError: If a leaf that the metric names is None.
        """
        given = {"W": W, "G": G, "X": X}
        known: dict[Metric, Tensor] = {}
        for leaf in sorted(self.leaves):
            tensor = given[leaf]
            if tensor is None:
                raise ValueError(f"metric '{self.text}' uses {leaf}, and {leaf} is None: pass it")
            known[Metric(leaf)] = tensor.to(torch.float32)
        return self._evaluate(known)

    def _evaluate(self, known: dict["Metric", Tensor]) -> Tensor:
        if self not in known:
            operands = [operand._evaluate(known) for operand in self.operands]
            known[self] = RELEASE[self.name].function(*operands)
        return known[self]

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.operands))

    def __hash__(self) -> int:
        # Cached at every node: `score` looks subtrees up by value.
        return self._hash


def _checked_line(text: str) -> str:
    """Return the text on one line; refuse, before the parser sees it, what no metric contains."""
    if len(text) > MAX_CHARACTERS:
        start = " ".join(text[:40].split())
        raise ValueError(
            f"metric '{start}...' has {len(text)} characters: at most {MAX_CHARACTERS} are read"
        )
    text = " ".join(text.split())
    if not text:
        raise ValueError("metric '' is empty: write a formula such as mul(W, sqrt(X))")
    if foreign := _OUTSIDE_THE_LANGUAGE.search(text):
        _refuse(text, foreign.start() + 1, f"has {foreign.group()!r}", "; write calls, names, ','")
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


def _from_ast(node: ast.expr, text: str) -> Metric:
    column = node.col_offset + 1
    if isinstance(node, ast.Name):
        if node.id not in LEAVES:
            _refuse(text, column, *_unknown(node.id, "leaf"))
        return Metric(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.keywords:
        _refuse(
            text, column, "has something that is neither an operator call nor a leaf", _leaves()
        )
    if node.func.id not in RELEASE:
        _refuse(text, column, *_unknown(node.func.id, "operator"))
    _check_arity(node.func.id, len(node.args), lambda problem: _refuse(text, column, problem, ""))
    return Metric(node.func.id, tuple(_from_ast(argument, text) for argument in node.args))


def _from_json(mapping: Any, path: str, depth: int) -> Metric:
    def refuse(problem: str, way_out: str = "") -> Never:
        raise ValueError(f"metric file: {path} {problem}{way_out}")

    if depth > MAX_DEPTH:
        refuse(f"is deeper than {MAX_DEPTH} levels")
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("data"), str):
        refuse('is not a node: write {"data": name, "left": {...}, "right": {...}}')
    if foreign := sorted(set(mapping) - {"data", "left", "right"}, key=str):
        refuse(f"has the unknown key {str(foreign[0])[:40]!r}: a node has data, left and right")
    name = mapping["data"]
    if name in LEAVES:
        if len(mapping) > 1:
            refuse(f"gives the leaf {name} an operand: a leaf has none")
        return Metric(name)
    if name not in RELEASE:
        refuse(*_unknown(name, "operator or leaf"))
    sides = [side for side in ("left", "right") if side in mapping]
    _check_arity(name, len(sides), refuse)
    if sides[0] != "left":
        refuse(f"gives {name} a right operand only: a unary node has 'left'")
    operands = tuple(_from_json(mapping[side], f"{path}.{side}", depth + 1) for side in sides)
    return Metric(name, operands)


def _check_arity(name: str, given: int, refuse: Any) -> None:
    if given != RELEASE[name].arity:
        refuse(f"gives {name} {given} operand(s), and it takes {RELEASE[name].arity}")


def _unknown(name: str, kind: str) -> tuple[str, str]:
    others = [other for other in (*LEAVES, *RELEASE) if other != name]
    near = difflib.get_close_matches(name[:40], others, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"has the unknown {kind} {name[:40]!r}", f"{guess}{_leaves()}"


def _leaves() -> str:
    return f"; leaves are {', '.join(LEAVES)}, operators {', '.join(RELEASE)}"
