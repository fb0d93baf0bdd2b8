"""A metric as one line of mathematics, for people; it is never read back.

A product of quotients has all its divisors behind one `/`, and each factor once. Roots and powers
show the bars of |x| where their operand can be negative; other guards are not shown.
"""

from typing import NamedTuple

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import POWER

_SIGNED, _SUM, _PRODUCT, _WORD, _POWER, _ATOM = range(6)
"""How tightly a text binds, from `−x` and `x + y` over `x · y`, `rowmean x` and `x²` to `x`."""

_NORMS = {"div": "norm", "divrms": "rms"}

_POWERS = {"sqr": 2.0, "pow": 2.0, "cube": 3.0, "sqrt": 0.5, "root4": 0.25, "pow15": 1.5}


class _Text(NamedTuple):
    """Part of a formula, and how tightly it binds."""

    text: str
    binding: int

    def at(self, least: int) -> str:
        """Return the text, in parentheses if it binds less tightly than needed."""
        if self.binding >= least:
            return self.text
        if self.binding == _WORD:  # as a call: rowmean(x)
            return self.text.replace(" ", "(") + ")"
        return f"({self.text})"


def line_of(metric: Metric) -> str:
    """Return the line; see `Metric.infix`."""
    return _infix(metric).text


def _infix(metric: Metric) -> _Text:
    if metric.is_constant:
        return _number(metric.value)
    if not metric.operands:
        return _Text(metric.name, _ATOM)
    if metric.name in ("mul", "quot", *_NORMS):
        return _quotient(metric)
    if metric.name in (*_POWERS, POWER):
        return _power(*_factors(metric)[0])
    operands = [_infix(operand) for operand in metric.operands]
    first, last = operands[0], operands[-1]
    match metric.name:
        case "add":
            return _Text(f"{first.at(_SIGNED)} + {last.at(_SUM)}", _SUM)
        case "sub":
            return _Text(f"{first.at(_SIGNED)} − {last.at(_PRODUCT)}", _SUM)
        case "neg":
            return _Text(f"−{first.at(_PRODUCT)}", _SIGNED)
        case "abs":
            return _magnitude(first)
        case name if name.startswith(("row", "col")) and first.text.isalpha():
            return _Text(f"{name} {first.text}", _WORD)
    return _Text(f"{metric.name}({', '.join(operand.text for operand in operands)})", _ATOM)


def _number(value: float) -> _Text:
    number = f"{abs(value):.4g}"
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


def _quotient(metric: Metric) -> _Text:
    exponents: dict[_Text, float] = {}
    for base, exponent in _factors(metric):
        if base.text != "1":
            exponents[base] = round(exponents.get(base, 0.0) + exponent, 6)
    above = [_power(base, x) for base, x in exponents.items() if x > 0] or [_Text("1", _ATOM)]
    below = [_power(base, -x) for base, x in exponents.items() if x < 0]
    line = " · ".join(factor.at(_POWER) for factor in above)
    if len(below) == 1:  # nothing follows that a word could be taken to include
        line += f" / {below[0].at(_WORD)}"
    elif below:
        line += f" / ({' · '.join(factor.at(_POWER) for factor in below)})"
    return _Text(line, above[0].binding if line == above[0].text else _PRODUCT)


def _factors(metric: Metric) -> list[tuple[_Text, float]]:
    """Return what a metric multiplies, with exponents, below 0 of what it divides by."""
    if metric.name in (*_POWERS, POWER):
        x = metric.operands[0]
        exponent = _POWERS.get(metric.name) or metric.operands[1].value
        keeps_sign = x.never_negative or metric.name in ("sqr", "pow", "cube")
        return [(_infix(x) if keeps_sign else _magnitude(_infix(x)), exponent)]
    if metric.name not in ("mul", "quot", *_NORMS):
        return [(_infix(metric), 1.0)]
    x, y = metric.operands
    if metric.name in _NORMS:
        return [*_factors(x), (_Text(f"{_NORMS[metric.name]}({y.infix})", _ATOM), -1.0)]
    sign = 1 if metric.name == "mul" else -1
    return [*_factors(x), *((base, sign * exponent) for base, exponent in _factors(y))]
