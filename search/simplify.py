"""Opposing-operation simplification: rewrites that leave the mask unchanged, and canonical text.

Trees that differ only in pairs that undo each other collapse into one (Dong et al., 2024,
arXiv:2406.02924, Section 3), so the population stays diverse and no evaluation is spent twice.
Two kinds of rewrite: those that keep the value, applied everywhere, and those that keep the
order, applied at the root alone. The leaves W, G and X are never negative, and the guards of the
operators decide what cancels: `exp(log(x))` stays, since its +0.001 swallows small scores in
fp32, and so do tanh and exp at the root, which saturate into ties.
"""

from collections.abc import Callable

from pruning.metric import Metric

Rewrite = Callable[[Metric], Metric | None]
"""Returns the replacement of a node, or None where it does not apply."""

_EVEN = frozenset({"abs", "sqrt", "log", "sqr"})
"""Operators that see only the magnitude of their operand."""

_ALWAYS_POSITIVE = frozenset({"W", "G", "X", "sqr", "pow", "abs", "exp", "sqrt", "mms"})


def simplify(metric: Metric, group: str) -> Metric:
    """Return the canonical form of a metric: the same mask, in no more nodes.

    Args:
        metric: Any metric.
        group: Its comparison group. Across the model a root `mms` or `div` is kept: it puts
            layers on one scale.
    """
    while True:
        simpler = _simplify_root(_simplify_node(metric), group)
        if simpler == metric:
            return metric
        metric = simpler


def never_negative(metric: Metric) -> bool:
    """Tell whether a formula's value is certainly 0 or more."""
    if metric.name in _ALWAYS_POSITIVE:
        return True
    if metric.name == "div":
        return never_negative(metric.operands[0])
    if metric.name in ("add", "mul", "tanh", "skp"):
        return all(never_negative(operand) for operand in metric.operands)
    return False


def _simplify_node(metric: Metric) -> Metric:
    metric = Metric(metric.name, tuple(_simplify_node(operand) for operand in metric.operands))
    for rewrite in VALUE_PRESERVING:
        replacement = rewrite(metric)
        if replacement is not None:
            return _simplify_node(replacement)
    return metric


def _simplify_root(metric: Metric, group: str) -> Metric:
    dropped = {"sqrt", "sqr"} | (set() if group == "model" else {"mms", "div"})
    while metric.name in dropped:
        scored = metric.operands[0]
        # sqrt and sqr rank by the magnitude; mms and div are a positive factor and a shift.
        magnitude = metric.name in ("sqrt", "sqr") and not never_negative(scored)
        metric = Metric("abs", (scored,)) if magnitude else scored
    return metric


def _drop_skip(node: Metric) -> Metric | None:
    return node.operands[0] if node.name == "skp" else None


def _name_square(node: Metric) -> Metric | None:
    if node.name == "pow" or (node.name == "mul" and node.operands[0] == node.operands[1]):
        return Metric("sqr", node.operands[:1])
    return None


def _drop_double_negation(node: Metric) -> Metric | None:
    return node.operands[0].operands[0] if _is(node, "neg", "neg") else None


def _drop_abs(node: Metric) -> Metric | None:
    return node.operands[0] if node.name == "abs" and never_negative(node.operands[0]) else None


def _drop_sign_under_even(node: Metric) -> Metric | None:
    if node.name in _EVEN and node.operands[0].name in ("neg", "abs"):
        return Metric(node.name, node.operands[0].operands)
    return None


def _cancel_root_and_square(node: Metric) -> Metric | None:
    if _is(node, "sqrt", "sqr") or _is(node, "sqr", "sqrt"):
        return Metric("abs", node.operands[0].operands)
    return None


def _drop_repeated_scaling(node: Metric) -> Metric | None:
    return node.operands[0] if _is(node, "mms", "mms") else None


def _move_negation_out(node: Metric) -> Metric | None:
    """`mul` and `div` pass a sign on, `add` and `sub` turn into each other."""
    if len(node.operands) != 2:
        return None
    left, right = node.operands
    if node.name == "div" and right.name in ("neg", "abs"):
        return Metric("div", (left, right.operands[0]))
    if node.name in ("mul", "div") and left.name == "neg":
        return Metric("neg", (Metric(node.name, (left.operands[0], right)),))
    if node.name == "mul" and right.name == "neg":
        return Metric("neg", (Metric("mul", (left, right.operands[0])),))
    if node.name in ("add", "sub") and right.name == "neg":
        return Metric("sub" if node.name == "add" else "add", (left, right.operands[0]))
    if node.name == "add" and left.name == "neg":
        return Metric("sub", (right, left.operands[0]))
    if node.name == "sub" and left.name == "neg":
        return Metric("neg", (Metric("add", (left.operands[0], right)),))
    return None


def _order_operands(node: Metric) -> Metric | None:
    if node.name in ("add", "mul") and node.operands[0].text > node.operands[1].text:
        return Metric(node.name, node.operands[::-1])
    return None


VALUE_PRESERVING: tuple[Rewrite, ...] = (
    _drop_skip,
    _name_square,
    _drop_double_negation,
    _drop_abs,
    _drop_sign_under_even,
    _cancel_root_and_square,
    _drop_repeated_scaling,
    _move_negation_out,
    _order_operands,
)


def _is(node: Metric, outer: str, inner: str) -> bool:
    return node.name == outer and node.operands[0].name == inner
