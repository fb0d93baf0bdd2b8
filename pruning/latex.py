"""A metric as a LaTeX formula, within the subset that matplotlib's mathtext draws too.

Parentheses appear only where the meaning would change without them. The operators' guards are
shown where they matter: sqrt(x) is the root of |x|, without the bars if x cannot be
negative.
"""

import re
from collections.abc import Callable

from pruning.metric import Metric

_SUM, _PRODUCT, _POWER, _ATOM = range(4)
"""How tightly a formula binds; a looser operand is put into parentheses."""

_Formula = tuple[str, int]
_NUMBER = re.compile(r"(-?)(\d*\.?\d+|\d+\.)(?:e([+-]?\d+))?", re.IGNORECASE)


def to_latex(metric: Metric) -> str:
    r"""Return the metric as LaTeX, such as `W \, \sqrt{X}`.

    An operator or leaf without a form here appears by its name: `\mathrm{name}(x)`.
    """
    return _formula(metric)[0]


def _formula(metric: Metric) -> _Formula:
    if not metric.operands:
        return _leaf(metric.name)
    if metric.name in _FORMS:
        return _FORMS[metric.name](*metric.operands)
    operands = r",\, ".join(to_latex(operand) for operand in metric.operands)
    return rf"{_upright(metric.name)}\left({operands}\right)", _POWER


def _leaf(name: str) -> _Formula:
    if number := _NUMBER.fullmatch(name):
        sign, digits, exponent = number.groups()
        value = rf"{digits} \times 10^{{{int(exponent)}}}" if exponent else digits
        return sign + value, _SUM if sign else _PRODUCT if exponent else _ATOM
    return (name if len(name) == 1 else _upright(name)), _ATOM


def _upright(name: str) -> str:
    escaped = name.replace("_", r"\_")
    return rf"\mathrm{{{escaped}}}"


def _in_parentheses(metric: Metric, level: int) -> str:
    """Return the formula, in parentheses if it binds less tightly than `level`."""
    text, binding = _formula(metric)
    return text if binding >= level else rf"\left({text}\right)"


def _after_sign(metric: Metric, level: int) -> str:
    """Return the formula as the right side of + or -, where no second sign may follow."""
    text = _in_parentheses(metric, level)
    return rf"\left({text}\right)" if text.startswith("-") else text


def _positive(metric: Metric) -> _Formula:
    """Return |x|, without the bars if x cannot be negative."""
    if metric.never_negative:
        return _formula(metric)
    return rf"\left|{to_latex(metric)}\right|", _ATOM


def _add(x: Metric, y: Metric) -> _Formula:
    return f"{to_latex(x)} + {_after_sign(y, _SUM)}", _SUM


def _subtract(x: Metric, y: Metric) -> _Formula:
    return f"{to_latex(x)} - {_after_sign(y, _PRODUCT)}", _SUM


def _multiply(x: Metric, y: Metric) -> _Formula:
    left, right = _in_parentheses(x, _PRODUCT), _in_parentheses(y, _PRODUCT)
    # Without the dot two numbers would read as one, and two pairs of bars as a norm.
    dot = right[0].isdigit() or (left.endswith(r"\right|") and right.startswith(r"\left|"))
    return rf"{left} {chr(92)}{'cdot' if dot else ','} {right}", _PRODUCT


def _negate(x: Metric) -> _Formula:
    return f"-{_in_parentheses(x, _PRODUCT)}", _SUM


def _divide_by_norm(x: Metric, y: Metric) -> _Formula:
    return rf"\frac{{{to_latex(x)}}}{{\left\|{to_latex(y)}\right\|_F}}", _PRODUCT


def _divide(x: Metric, y: Metric) -> _Formula:
    return rf"\frac{{{to_latex(x)}}}{{{to_latex(y)}}}", _PRODUCT


def _absolute(x: Metric) -> _Formula:
    # Bars within bars would read as a norm, and they change nothing.
    return _formula(x) if x.name == "abs" else (rf"\left|{to_latex(x)}\right|", _ATOM)


def _logarithm(x: Metric) -> _Formula:
    return rf"\ln\left({_positive(x)[0]} + 0.001\right)", _POWER


def _root(x: Metric) -> _Formula:
    return rf"\sqrt{{{_positive(x)[0]}}}", _POWER


def _power(exponent: str) -> Callable[[Metric], _Formula]:
    return lambda x: (f"{_in_parentheses(x, _ATOM)}^{{{exponent}}}", _POWER)


def _power_of_absolute(exponent: str) -> Callable[[Metric], _Formula]:
    def form(x: Metric) -> _Formula:
        text, level = _positive(x)
        base = text if level == _ATOM else rf"\left({text}\right)"
        return f"{base}^{{{exponent}}}", _POWER

    return form


def _call(function: str) -> Callable[[Metric], _Formula]:
    return lambda x: (rf"{function}\left({to_latex(x)}\right)", _POWER)


def _norm(axis: str) -> Callable[[Metric], _Formula]:
    return lambda x: (rf"\left\|{to_latex(x)}\right\|_{{\mathrm{{{axis}}}}}", _POWER)


_FORMS: dict[str, Callable[..., _Formula]] = {
    "add": _add,
    "sub": _subtract,
    "mul": _multiply,
    "div": _divide_by_norm,
    "quot": _divide,
    "sqr": _power("2"),
    "pow": _power("2"),
    "cube": _power("3"),
    "root4": _power_of_absolute("1/4"),
    "pow15": _power_of_absolute("1.5"),
    "neg": _negate,
    "skp": _formula,
    "abs": _absolute,
    "log": _logarithm,
    "exp": _call(r"\exp"),
    "sqrt": _root,
    "tanh": _call(r"\tanh"),
    "rownorm": _norm("row"),
    "colnorm": _norm("col"),
    **{
        f"{axis}{name}": _call(rf"{symbol}_{{\mathrm{{{axis}}}}}")
        for axis in ("row", "col")
        for name, symbol in {"sum": r"\Sigma", "mean": r"\mu", "max": r"\max"}.items()
    },
}
