"""A metric as one line of mathematics, for people; `pruning.parse` reads it, too.

A product of quotients has all its divisors behind one `/`, and each factor once. Roots and powers
show the bars of |x| where their operand can be negative; other guards are not shown.
"""

from typing import NamedTuple

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import POWER

_SIGNED, _SUM, _PRODUCT, _POWER, _ATOM = range(5)
"""How tightly a text binds, from `−x` and `x + y` over `x · y` and `x²` to `x`."""

POWERS = {"sqr": 2.0, "pow": 2.0, "cube": 3.0, "sqrt": 0.5, "root4": 0.25, "pow15": 1.5}
"""Exponents by operator; of two with the same the first is read."""


class _Text(NamedTuple):
    """Part of a formula, and how tightly it binds."""

    text: str
    binding: int

    def at(self, least: int) -> str:
        """Return the text, in parentheses if it binds less tightly than needed."""
        return self.text if self.binding >= least else f"({self.text})"


def line_of(metric: Metric) -> str:
    """Return the line; see `Metric.infix`."""
    return _infix(metric).text


def _infix(metric: Metric) -> _Text:
    if metric.is_constant:
        return _number(metric.value)
    if not metric.operands:
        return _Text(metric.name, _ATOM)
    if metric.name in ("mul", "quot"):
        return _quotient(metric)
    if _exponent(metric) is not None:
        return _power(*_factors(metric)[0])
    operands = [_infix(operand) for operand in metric.operands]
    first, last = operands[0], operands[-1]
    match metric.name:
        case "add":
            return _Text(f"{first.at(_SIGNED)} + {last.at(_SUM)}", _SUM)
        case "sub":
            return _Text(f"{first.at(_SIGNED)} − {last.at(_PRODUCT)}", _SUM)
        case "neg":
            return _Text(f"−{first.at(_POWER)}", _SIGNED)
        case "abs":
            return _magnitude(first)
        case "div" | "divrms":  # a factor of its own: what it divides says how wide a norm goes
            norm = "norm" if metric.name == "div" else "rms"
            return _Text(f"{first.at(_PRODUCT)} / {norm}({last.text})", _PRODUCT)
    return _Text(f"{metric.name}({', '.join(operand.text for operand in operands)})", _ATOM)


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


def _quotient(metric: Metric) -> _Text:
    factors = [(base, x) for base, x in _factors(metric) if base.text != "1"]
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


def _exponent(metric: Metric) -> float | None:
    """Return c of a metric that is x ** c or |x| ** c by its operator; None of any other."""
    if metric.name == POWER and metric.operands[1].is_constant:
        return metric.operands[1].value
    return POWERS.get(metric.name)


def _factors(metric: Metric) -> list[tuple[_Text, float]]:
    """Return what a metric multiplies, with exponents, below 0 of what it divides by."""
    if (exponent := _exponent(metric)) is not None:
        x = metric.operands[0]
        keeps_sign = x.never_negative or metric.name in ("sqr", "pow", "cube")
        return [(_infix(x) if keeps_sign else _magnitude(_infix(x)), exponent)]
    if metric.name not in ("mul", "quot"):
        return [(_infix(metric), 1.0)]
    x, y = metric.operands
    sign = 1 if metric.name == "mul" else -1
    return [*_factors(x), *((base, sign * exponent) for base, exponent in _factors(y))]
