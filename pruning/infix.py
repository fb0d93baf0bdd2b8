"""A metric as one line of mathematics, such as `W² · G · √X / (rowmean W + colmean W)`.

For people: it is never read back. A product of quotients is written with all its divisors behind
one `/`. Roots and `^1.5` show the bars of |x| where their operand can be negative; all other guards
are those of `pruning.operators`.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from prunevolve.pruning.metric import Metric

_SIGNED, _SUM, _PRODUCT, _WORD, _POWER, _ATOM = range(6)
"""How tightly a text binds, from `−x` and `x + y` over `x · y`, `rowmean x` and `x²` to `x`."""

_POWERS = {"sqr": "²", "pow": "²", "cube": "³"}
_ROOTS = {"sqrt": "√", "root4": "∜"}
_NORMS = {"div": "norm", "divrms": "rms"}
_WORDS = {
    f"{side}{name}" for side in ("row", "col") for name in ("sum", "mean", "max", "norm", "rms")
}


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


def infix(metric: "Metric") -> str:
    """Return a metric as one line of mathematics; an operator without a form as `name(x, y)`."""
    return _text(metric).text


def _text(metric: "Metric") -> _Text:
    if not metric.operands:
        return _end(metric)
    if metric.name in ("mul", "quot", *_NORMS):
        return _quotient(metric)
    operands = [_text(operand) for operand in metric.operands]
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
        case name if name in _POWERS:
            return _Text(f"{first.at(_ATOM)}{_POWERS[name]}", _POWER)
        case name if name in _ROOTS:
            return _Text(f"{_ROOTS[name]}{positive.at(_ATOM)}", _POWER)
        case name if name in _WORDS and first.text.isalpha():
            return _Text(f"{name} {first.text}", _WORD)
    return _Text(f"{metric.name}({', '.join(operand.text for operand in operands)})", _ATOM)


def _end(metric: "Metric") -> _Text:
    if not metric.is_constant:
        return _Text(metric.name, _ATOM)
    number = f"{abs(metric.value):.4g}"
    if metric.value < 0:
        return _Text(f"−{number}", _SIGNED)
    return _Text(number, _PRODUCT if "e" in number else _ATOM)


def _magnitude(operand: _Text) -> _Text:
    # Bars within bars cannot be told apart.
    bars = "abs({})" if "|" in operand.text else "|{}|"
    return _Text(bars.format(operand.text), _ATOM)


def _quotient(metric: "Metric") -> _Text:
    """Return a product of quotients as one quotient."""
    above, below = _factors(metric)
    above = [factor for factor in above if factor.text != "1"] or above[:1]
    product = " · ".join(factor.at(_POWER) for factor in above)
    if not below:
        return _Text(product, _PRODUCT)
    if len(below) == 1:  # nothing follows that a word could be taken to include
        return _Text(f"{product} / {below[0].at(_WORD)}", _PRODUCT)
    divisors = " · ".join(factor.at(_POWER) for factor in below)
    return _Text(f"{product} / ({divisors})", _PRODUCT)


def _factors(metric: "Metric") -> tuple[list[_Text], list[_Text]]:
    """Return the factors above and below the line."""
    match metric.name, metric.operands:
        case "mul", (x, y):
            (above, below), (more_above, more_below) = _factors(x), _factors(y)
            return above + more_above, below + more_below
        case "quot", (x, y):
            (above, below), (more_below, more_above) = _factors(x), _factors(y)
            return above + more_above, below + more_below
        case name, (x, y) if name in _NORMS:
            above, below = _factors(x)
            norm = f"{_NORMS[name]}({infix(y)})"
            return above, [*below, _Text(norm, _ATOM)]
    return [_text(metric)], []
