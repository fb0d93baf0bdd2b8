"""A metric as one line of mathematics, for people; it is never read back.

A product of quotients has all its divisors behind one `/`. Roots and powers show the bars of |x|
where their operand can be negative; other guards are not shown.
"""

from typing import NamedTuple

from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import POWER

_SIGNED, _SUM, _PRODUCT, _WORD, _POWER, _ATOM = range(6)
"""How tightly a text binds, from `−x` and `x + y` over `x · y`, `rowmean x` and `x²` to `x`."""

_NORMS = {"div": "norm", "divrms": "rms"}


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
        number = f"{abs(metric.value):.4g}"
        if metric.value < 0:
            return _Text(f"−{number}", _SIGNED)
        return _Text(number, _PRODUCT if "e" in number else _ATOM)
    if not metric.operands:
        return _Text(metric.name, _ATOM)
    if metric.name in ("mul", "quot", *_NORMS):
        return _quotient(metric)
    operands = [_infix(operand) for operand in metric.operands]
    first, last = operands[0], operands[-1]
    positive = first if metric.operands[0].never_negative else _magnitude(first)
    match metric.name:
        case "add":
            return _Text(f"{first.at(_SIGNED)} + {last.at(_SUM)}", _SUM)
        case "sub":
            return _Text(f"{first.at(_SIGNED)} − {last.at(_PRODUCT)}", _SUM)
        case "neg":
            return _Text(f"−{first.at(_PRODUCT)}", _SIGNED)
        case "abs":
            return _magnitude(first)
        case "pow15":
            return _Text(f"{positive.at(_ATOM)}^1.5", _POWER)
        case "power":
            return _Text(f"{positive.at(_ATOM)}^{last.at(_ATOM)}", _POWER)
        case "sqr" | "pow" | "cube" as name:
            return _Text(f"{first.at(_ATOM)}{'³' if name == 'cube' else '²'}", _POWER)
        case "sqrt" | "root4" as name:
            return _Text(f"{'√' if name == 'sqrt' else '∜'}{positive.at(_ATOM)}", _POWER)
        case name if name.startswith(("row", "col")) and first.text.isalpha():
            return _Text(f"{name} {first.text}", _WORD)
    return _Text(f"{metric.name}({', '.join(operand.text for operand in operands)})", _ATOM)


def _magnitude(operand: _Text) -> _Text:
    # Bars within bars cannot be told apart.
    bars = "abs({})" if "|" in operand.text else "|{}|"
    return _Text(bars.format(operand.text), _ATOM)


def _quotient(metric: Metric) -> _Text:
    above, below = _factors(metric)
    above = [x for x in above if x.text != "1"] or above[:1] or [_Text("1", _ATOM)]
    line = " · ".join(factor.at(_POWER) for factor in above)
    if len(below) == 1:  # nothing follows that a word could be taken to include
        line += f" / {below[0].at(_WORD)}"
    elif below:
        line += f" / ({' · '.join(factor.at(_POWER) for factor in below)})"
    return _Text(line, _PRODUCT)


def _factors(metric: Metric) -> tuple[list[_Text], list[_Text]]:
    """Return the factors above and below the line."""
    if metric.name == POWER and metric.operands[1].is_constant and metric.operands[1].value < 0:
        x, exponent = metric.operands
        return [], [_infix(Metric(POWER, (x, Metric.constant(-exponent.value))))]
    if metric.name not in ("mul", "quot", *_NORMS):
        return [_infix(metric)], []
    x, y = metric.operands
    above, below = _factors(x)
    if metric.name in _NORMS:
        return above, [*below, _Text(f"{_NORMS[metric.name]}({y.infix})", _ATOM)]
    factors, divisors = _factors(y) if metric.name == "mul" else reversed(_factors(y))
    return above + factors, below + divisors
