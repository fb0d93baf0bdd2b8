"""The text of a metric: nested calls, or a line of mathematics for people; both are read.

A product of quotients has all its divisors behind one `/`, and each factor once. Roots and powers
show the bars of |x| where their operand can be negative; other guards are not shown. Text is parsed
by `ast` and never evaluated.
"""

import ast
import difflib
import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Never

from prunevolve.pruning.baselines import FORMS
from prunevolve.pruning.operators import OPERATORS, POWER
from prunevolve.pruning.statistics import TERMINALS

MAX_DEPTH = 32  # of a metric that is read, root at depth 0; a search's own limit is far lower
MAX_CHARACTERS = 20_000  # that are read, so that hostile input costs nothing

# Exponents by operator; of two with the same the first is read.
POWERS = {"sqr": 2.0, "pow": 2.0, "cube": 3.0, "sqrt": 0.5, "root4": 0.25, "pow15": 1.5}
SIGNED_POWER = "^"  # what x ^ c is read as: x ** c, of |x| unless c is odd

_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_FOREIGN = re.compile(r"[^\w\s(),.+*/^|·−√∜²³-]", re.ASCII)

# Signs of a line of mathematics as Python's; `~`, too, binds tighter than a product.
_PYTHON = str.maketrans(
    {"·": "*", "−": "-", "^": "**", "²": "**2", "³": "**3", "√": "~", "∜": "~~"}
)
_SIGNS: dict[type[ast.AST], str] = {
    **{ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "quot", ast.Pow: POWER},
    **{ast.USub: "neg", ast.Invert: "sqrt"},
}

# How tightly a text binds, from `−x` and `x + y` over `x · y` and `x²` to `x`.
_SIGNED, _SUM, _PRODUCT, _POWER, _ATOM = range(5)


@dataclass(frozen=True)
class Call:
    """What a text says: an operator, or `SIGNED_POWER`, on operands, a terminal or a number."""

    name: str
    operands: tuple["Call", ...] = ()

    @property
    def is_constant(self) -> bool:
        """Whether it is a number."""
        return not self.operands and self.name not in TERMINALS

    @property
    def value(self) -> float:
        """The number; only a constant has one."""
        return float(self.name)

    @cached_property
    def never_negative(self) -> bool:
        """Whether the score is certainly 0 or more, whatever the weights."""
        if self.operands:
            rule = OPERATORS[self.name].never_negative
            signs = [operand.never_negative for operand in self.operands]
            return rule if isinstance(rule, bool) else rule(signs)
        return self.value >= 0 if self.is_constant else not TERMINALS[self.name].signed

    @property
    def infix(self) -> str:
        """One line of mathematics, such as `W² · G · √X / rowmean(W)`; `read_formula` reads it.

        An operator without a form of its own is shown as `name(x, y)`.
        """
        return _infix(self).text


def read_formula(text: str) -> Call:
    """Return what a text spells; raises ValueError as `Metric.parse` does."""
    if not isinstance(text, str):
        raise ValueError(f"metric must be text such as W * sqrt(X), got {text!r:.40}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"metric {text[:40]!r}... is longer than {MAX_CHARACTERS} characters")
    text = " ".join(text.split())
    if foreign := _FOREIGN.search(text):
        refuse(text, foreign.start(), f"{foreign.group()!r} is not in the language; {FORMS}")
    text = re.sub(r"\|([^|]*)\|", r"abs(\1)", text.translate(_PYTHON))
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        is_open = "was never closed" in str(error)
        problem = "missing )" if is_open else f"this is malformed; {FORMS}"
        refuse(text, (getattr(error, "offset", None) or 1) - 1, problem)
    return _from_ast(tree, text, depth=0)


def refuse(text: str, start: int, problem: str) -> Never:
    """Raise ValueError that points at a place of a text."""
    excerpt = text[max(0, start - 30) : start + 30]
    raise ValueError(f"metric '{excerpt}', at column {start + 1}: {problem}")


def _from_ast(node: ast.expr, text: str, depth: int) -> Call:
    refuse_here = partial(refuse, text, node.col_offset)
    if depth > MAX_DEPTH:
        refuse_here(f"this is deeper than {MAX_DEPTH} levels")
    # The text is ASCII by now, so the parser's byte offsets count characters.
    written = text[node.col_offset : node.end_col_offset]
    if _NUMBER.fullmatch(written):
        return Call(written)
    name, operands = _operation(node)
    if not name:
        refuse_here(f"this is neither a call nor a terminal; {FORMS}")
    if name not in OPERATORS and name not in TERMINALS:
        near = difflib.get_close_matches(name[:40], [*TERMINALS, *OPERATORS], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        terminals, operators = ", ".join(TERMINALS), ", ".join(OPERATORS)
        names = f"terminals are {terminals} and numbers, operators {operators}"
        refuse_here(f"{name[:40]!r} is unknown: {guess}{names}")
    arity = OPERATORS[name].arity if name in OPERATORS else 0
    if len(operands) != arity:
        refuse_here(f"{name} takes {arity} operand(s), not {len(operands)}")
    read = tuple(_from_ast(x, text, depth + 1) for x in operands)
    is_signed = isinstance(node, ast.BinOp) and name == POWER and read[1].is_constant
    return Call(SIGNED_POWER if is_signed else name, read)


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


class _Text(NamedTuple):
    """Part of a formula, and how tightly it binds."""

    text: str
    binding: int

    def at(self, least: int) -> str:
        """Return the text, in parentheses if it binds less tightly than needed."""
        return self.text if self.binding >= least else f"({self.text})"


def _infix(call: Call) -> _Text:
    if call.is_constant:
        return _number(call.value)
    if not call.operands:
        return _Text(call.name, _ATOM)
    if call.name in ("mul", "quot"):
        return _quotient(call)
    if _exponent(call) is not None:
        return _power(*_factors(call)[0])
    operands = [_infix(operand) for operand in call.operands]
    first, last = operands[0], operands[-1]
    match call.name:
        case "add":
            return _Text(f"{first.at(_SIGNED)} + {last.at(_SUM)}", _SUM)
        case "sub":
            return _Text(f"{first.at(_SIGNED)} − {last.at(_PRODUCT)}", _SUM)
        case "neg":
            return _Text(f"−{first.at(_POWER)}", _SIGNED)
        case "abs":
            return _magnitude(first)
        case "div" | "divrms":  # a factor of its own: what it divides says how wide a norm goes
            norm = "norm" if call.name == "div" else "rms"
            return _Text(f"{first.at(_PRODUCT)} / {norm}({last.text})", _PRODUCT)
    return _Text(f"{call.name}({', '.join(operand.text for operand in operands)})", _ATOM)


def _number(value: float) -> _Text:
    number = f"{abs(value):.9g}"  # nine digits tell any two apart in fp32
    if value < 0:
        return _Text(f"−{number}", _SIGNED)
    return _Text(number, _PRODUCT if "e" in number else _ATOM)


def _magnitude(operand: _Text) -> _Text:
    # Bars within bars cannot be told apart.
    bars = "abs({})" if "|" in operand.text else "|{}|"
    return _Text(bars.format(operand.text), _ATOM)


def _power(base: _Text, exponent: float) -> _Text:
    if exponent == 1:
        return base
    if root := {0.5: "√", 0.25: "∜"}.get(exponent):
        return _Text(f"{root}{base.at(_ATOM)}", _POWER)
    if digit := {2.0: "²", 3.0: "³"}.get(exponent):
        return _Text(f"{base.at(_ATOM)}{digit}", _POWER)
    return _Text(f"{base.at(_ATOM)}^{_number(exponent).at(_ATOM)}", _POWER)


def _quotient(call: Call) -> _Text:
    factors = [(base, x) for base, x in _factors(call) if base.text != "1"]
    exponents: dict[_Text, float] = {}
    for base, exponent in factors:
        exponents[base] = round(exponents.get(base, 0.0) + exponent, 6)
    if all(exponents.values()):  # what cancels stays: a quotient is guarded, and has its sides
        factors = list(exponents.items())
    above = [_power(base, x) for base, x in factors if x > 0] or [_Text("1", _ATOM)]
    below = [_power(base, -x) for base, x in factors if x < 0]
    line = " · ".join(factor.at(_POWER) for factor in above)
    if below:
        divisor = " · ".join(factor.at(_POWER) for factor in below)
        line += f" / {divisor}" if len(below) == 1 else f" / ({divisor})"
    return _Text(line, above[0].binding if line == above[0].text else _PRODUCT)


def _exponent(call: Call) -> float | None:
    """Return c of a call that is x ** c or |x| ** c by its operator; None of any other."""
    if call.name == POWER and call.operands[1].is_constant:
        return call.operands[1].value
    return POWERS.get(call.name)


def _factors(call: Call) -> list[tuple[_Text, float]]:
    """Return what a call multiplies, with exponents, below 0 of what it divides by."""
    if (exponent := _exponent(call)) is not None:
        x = call.operands[0]
        keeps_sign = x.never_negative or call.name in ("sqr", "pow", "cube")
        return [(_infix(x) if keeps_sign else _magnitude(_infix(x)), exponent)]
    if call.name not in ("mul", "quot"):
        return [(_infix(call), 1.0)]
    x, y = call.operands
    sign = 1 if call.name == "mul" else -1
    return [*_factors(x), *((base, sign * exponent) for base, exponent in _factors(y))]
