"""A metric as a formula in MathML, which browsers draw by themselves.

Parentheses appear only where the meaning would change without them. The operators' guards are
shown where they matter: sqrt(x) is the root of |x|, without the bars if x cannot be negative.
"""

from typing import NamedTuple

from markupsafe import Markup, escape

from prunevolve.pruning.metric import Metric

_SIGNED, _SUM, _PRODUCT, _POWER, _ATOM = range(5)
"""How tightly a formula binds; an operand that binds less tightly than needed is parenthesized."""

_MINUS = "<mrow><mo>−</mo>{0}</mrow>"  # first in a row it is a sign, not a difference


class _Form(NamedTuple):
    """How an operator is written.

    Attributes:
        mathml: The formula, with `{0}` and `{1}` for the operands.
        binding: How tightly it binds.
        needed: How tightly each operand must bind to stand without parentheses.
        positive: Whether an operand stands between bars if it can be negative.
    """

    mathml: str
    binding: int = _POWER
    needed: tuple[int, ...] = (_SIGNED, _SIGNED)
    positive: bool = False


def to_mathml(metric: Metric) -> Markup:
    """Return the metric in MathML; an operator without a form here appears as `name(x)`."""
    return Markup(f'<math display="block">{_formula(metric)[0]}</math>')


def _formula(metric: Metric) -> tuple[str, int]:
    """Return the inner MathML, and how tightly it binds."""
    if not metric.operands:
        return _leaf(metric)
    form = _FORMS.get(metric.name) or _call(f"<mi>{escape(metric.name)}</mi>", len(metric.operands))
    operands = [
        _operand(operand, needed, form.positive)
        for operand, needed in zip(metric.operands, form.needed, strict=False)
    ]
    return form.mathml.format(*operands), form.binding


def _leaf(leaf: Metric) -> tuple[str, int]:
    if not leaf.is_constant:
        return f"<mi>{escape(leaf.name)}</mi>", _ATOM
    digits, _, exponent = leaf.name.lower().lstrip("-").partition("e")
    mathml, binding = f"<mn>{digits}</mn>", _ATOM
    if exponent:
        mathml += f"<mo>×</mo><msup><mn>10</mn><mn>{int(exponent)}</mn></msup>"
        binding = _PRODUCT
    if leaf.name.startswith("-"):
        return _MINUS.format(mathml), _SIGNED
    return mathml, binding


def _operand(metric: Metric, needed: int, positive: bool) -> str:
    """Return an operand as one element, between bars or in parentheses where it needs them."""
    mathml, binding = _formula(metric)
    if positive and not metric.never_negative:
        mathml = _between("|", mathml, "|")
    elif binding < needed:
        mathml = _between("(", mathml, ")")
    return f"<mrow>{mathml}</mrow>"


def _between(left: str, mathml: str, right: str) -> str:
    return f"<mrow><mo>{left}</mo>{mathml}<mo>{right}</mo></mrow>"


def _call(function: str, operands: int = 1) -> _Form:
    arguments = "<mo>,</mo>".join(f"{{{i}}}" for i in range(operands))
    return _Form(f"{function}{_between('(', arguments, ')')}")


def _to_the(power: str, positive: bool = False) -> _Form:
    return _Form(f"<msup>{{0}}<mn>{power}</mn></msup>", needed=(_ATOM,), positive=positive)


def _norm(operand: str, kind: str) -> str:
    return f"<msub>{_between('‖', operand, '‖')}<mtext>{kind}</mtext></msub>"


_FORMS = {
    "add": _Form("{0}<mo>+</mo>{1}", _SUM, (_SIGNED, _SUM)),
    "sub": _Form("{0}<mo>−</mo>{1}", _SUM, (_SIGNED, _PRODUCT)),
    "mul": _Form("{0}<mo>⋅</mo>{1}", _PRODUCT, (_PRODUCT, _PRODUCT)),
    "div": _Form(f"<mfrac>{{0}}{_norm('{1}', 'F')}</mfrac>", _PRODUCT),
    "quot": _Form("<mfrac>{0}{1}</mfrac>", _PRODUCT),
    "sqr": _to_the("2"),
    "pow": _to_the("2"),
    "cube": _to_the("3"),
    "root4": _to_the("1/4", positive=True),
    "pow15": _to_the("1.5", positive=True),
    "neg": _Form(_MINUS, _SIGNED, (_PRODUCT,)),
    "abs": _Form(_between("|", "{0}", "|"), _ATOM),
    "sqrt": _Form("<msqrt>{0}</msqrt>", positive=True),
    "log": _Form(f"<mi>ln</mi>{_between('(', '{0}<mo>+</mo><mn>0.001</mn>', ')')}", positive=True),
    "exp": _call("<mi>exp</mi>"),
    "tanh": _call("<mi>tanh</mi>"),
    **{
        f"{side}{name}": _call(f"<msub><mi>{symbol}</mi><mtext>{side}</mtext></msub>")
        for side in ("row", "col")
        for name, symbol in {"sum": "Σ", "mean": "μ", "max": "max"}.items()
    },
    "rownorm": _Form(_norm("{0}", "row")),
    "colnorm": _Form(_norm("{0}", "col")),
}
