"""Opposing-operation simplification: rewrites that leave the mask unchanged, and canonical text.

Trees that differ only in pairs of operations that cancel collapse into one (Dong et al., 2024,
arXiv:2406.02924, Section 3), so the population stays diverse and nothing is evaluated twice.
There are two kinds of rewrite: those that preserve the value, applied everywhere, and those that
preserve the order, applied only at the root. All terminals except M are non-negative, and the
operators' guards decide what cancels: `exp(log(x))` stays, since its +0.001 swallows small scores
in fp32, and so do tanh and exp at the root, which saturate into ties. Powers, factors and addends
at the root are dropped: they preserve the order of the exact scores, and where fp32 would lose it
to overflow, underflow or rounding, the simplified metric does not.
"""

from collections.abc import Callable
from functools import lru_cache

from prunevolve.pruning.metric import Criterion, Metric, interned, is_number
from prunevolve.pruning.operators import OPERATORS, POWER
from prunevolve.search.breeding.product import as_power, flat_product, powered, product_of

Rewrite = Callable[[Metric], Metric | None]  # returns the replacement for a node, if it applies

_EVEN = frozenset({"abs", "sqrt", "log", "sqr", "rownorm", "colnorm", POWER})  # ignore a sign
_ODD = frozenset({"cube", "rowsum", "rowmean", "colsum", "colmean"})  # pass on a sign

_ZERO, _ONE = Metric.constant(0), Metric.constant(1)


def simplify(criterion: Criterion) -> Criterion:
    """Return the canonical form of a criterion: the same mask, from a metric with no more nodes.

    When the whole model is one group, a root `mms` or `div` is kept: it puts layers on one scale.
    """
    metric = criterion.metric
    while (simpler := _simplify_root(_simplify_node(metric), criterion.group)) != metric:
        metric = simpler
    return Criterion(metric, criterion.group)


@lru_cache(1 << 15)
def _simplify_node(metric: Metric) -> Metric:
    metric = interned(metric.name, tuple(map(_simplify_node, metric.operands)))
    for rewrite in VALUE_PRESERVING:
        if replacement := rewrite(metric):
            return _simplify_node(replacement)
    return metric


def _simplify_root(metric: Metric, group: str) -> Metric:
    # mms and div apply a positive factor and a shift, but different ones in each layer.
    dropped = {"cube"} | (set() if group == "model" else {"mms", "div"})
    base, exponent = as_power(metric)
    match metric:
        case Metric("neg", (inner,)):
            return Metric("neg", (_simplify_root(inner, group),))
        case _ if base is not metric and exponent > 0:
            simpler: Metric | None = powered(base, 1)
        case Metric(name, (inner, *_)) if name in dropped:
            simpler = inner
        case _:
            simpler = _drop_number(metric)
    return _simplify_root(simpler, group) if simpler else metric


def _drop_number(metric: Metric) -> Metric | None:
    """Return the other operand of a sum, product or quotient with a number, negated if the order
    is reversed; None if it does not apply.
    """
    if len(metric.operands) != 2:
        return None
    left, right = metric.operands
    if metric.name == "sub" and left.is_constant:
        return Metric("neg", (right,))
    if metric.name in ("add", "mul") and left.is_constant:
        left, right = right, left
    if not right.is_constant or metric.name not in ("add", "mul", "quot"):
        return None
    if metric.name == "add" or right.value > 0:
        return left
    # A factor 0 stays, so that its scores are recognised as constant.
    return Metric("neg", (left,)) if right.value < 0 else None


def _fold_numbers(node: Metric) -> Metric | None:
    """Fold an operator on numbers alone, if it is well typed and fp32 can hold the result."""
    if not node.operands or not all(operand.is_constant for operand in node.operands):
        return None
    operator = OPERATORS[node.name]
    if operator.typing.refuses(*(operand.shape for operand in node.operands)):
        return None
    value = operator.function(*(operand.score() for operand in node.operands)).item()
    return Metric.constant(value) if is_number(value) else None


def _merge_factors(node: Metric) -> Metric | None:
    """Merge nested factors, or a negation and a factor, into one factor."""
    match node:
        case Metric("neg", (inner,)):
            return _opposite(inner)
        case Metric("mul", (number, Metric("mul", (factor, scaled)))) if number.is_constant:
            product = _fold_numbers(Metric("mul", (number, factor)))
            # If it overflows or underflows in fp32, its factors still work one by one.
            return Metric("mul", (product, scaled)) if product and product.value else None
    return None


def _merge_powers(node: Metric) -> Metric | None:
    """Merge powers of powers, and a product's powers of one thing; prefer `sqrt` and `sqr`.

    Only what is certainly no quotient: a divisor is kept away from 0.
    """
    base, exponent = as_power(node)
    if base is not node:
        inner, other = as_power(base)
        if inner is not base and exponent > 0 and is_number(exponent * other):
            return powered(inner, exponent * other)
        plain = powered(base, exponent)
        return plain if plain != node else None
    if node.name != "mul":
        return None
    exponents: dict[Metric, float] = {}
    others, merged = [], False
    for factor in flat_product(node):
        base, exponent = as_power(factor)
        if base.is_constant or exponent <= 0 or (base is factor and not base.never_negative):
            others.append(factor)
        else:
            merged |= base in exponents
            exponents[base] = exponents.get(base, 0.0) + exponent
    powers = (powered(base, exponent) for base, exponent in exponents.items())
    return product_of([*others, *powers]) if merged else None


def _cancel(node: Metric) -> Metric | None:
    """Name a square; drop what does nothing, or is undone or already done by what is inside it."""
    match node:
        case Metric("add", (number, other)) if number == _ZERO:
            return other
        case Metric("mul", (number, other)) | Metric("quot", (other, number)) if number == _ONE:
            return other
        case Metric("mul", (inner, other)) if inner == other:
            return Metric("sqr", (inner,))
        case Metric("pow", operands):
            return Metric("sqr", operands)
        case Metric("skp", (inner,)) | Metric("neg", (Metric("neg", (inner,)),)):
            return inner
        case Metric("mms", (Metric("mms") as inner,)):
            return inner
        case Metric("abs", (inner,)) if inner.never_negative:
            return inner
        case Metric(name, (Metric("neg" | "abs", operands), *rest)) if name in _EVEN:
            return Metric(name, (*operands, *rest))
    return None


def _order_operands(node: Metric) -> Metric | None:
    """Move a sign out of `mul`, `div`, `quot`, sums and cubes, swap `add` and `sub` for one, and
    sort the operands of `add` and `mul` by text.
    """
    match node:
        case Metric(name, (Metric("neg", operands),)) if name in _ODD:
            return Metric("neg", (Metric(name, operands),))
        case Metric("div", (left, Metric("neg" | "abs", (inner,)))):
            return Metric("div", (left, inner))
        case Metric("mul" | "div" | "quot" as name, (Metric("neg", (inner,)), right)):
            return Metric("neg", (Metric(name, (inner, right)),))
        case Metric("mul", (left, Metric("neg", (inner,)))):
            return Metric("neg", (Metric("mul", (left, inner)),))
        case Metric("add" | "sub" as name, (left, Metric("neg", (inner,)))):
            return Metric("sub" if name == "add" else "add", (left, inner))
        case Metric("sub", (left, right)) if opposite := _opposite(right):
            return Metric("add", (left, opposite))
        case Metric("add", (Metric("neg", (inner,)), right)):
            return Metric("sub", (right, inner))
        case Metric("sub", (Metric("neg", (inner,)), right)):
            return Metric("neg", (Metric("add", (inner, right)),))
        case Metric("add" | "mul" as name, (left, right)) if left.text > right.text:
            return Metric(name, (right, left))
    return None


VALUE_PRESERVING: tuple[Rewrite, ...] = (
    _fold_numbers,
    _cancel,
    _merge_factors,
    _merge_powers,
    _order_operands,
)


def _opposite(node: Metric) -> Metric | None:
    """Return the negation of a number or of a product with a number, with as many nodes."""
    match node:
        case Metric("mul", (factor, scaled)) if factor.is_constant:
            return Metric("mul", (Metric.constant(-factor.value), scaled))
    return Metric.constant(-node.value) if node.is_constant else None
