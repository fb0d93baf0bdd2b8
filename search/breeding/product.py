"""A metric as a product of powers, on which breeding, descents and simplification work."""

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import groupby
from math import prod

from prunevolve.pruning.formula import POWERS
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import NUMBER, POWER, Shape

_ONE = Metric.constant(1)

Exponents = dict[Metric, float]  # the exponents of the bases whose product a metric is


def exponents_of(metric: Metric, relative: bool) -> Exponents:
    """Return the bases whose product a metric is, with their exponents.

    Numbers in an exponential's product are its exponent: exp(mul(c, x)) is exp(x) to the power c.
    If relative, a matrix and its mean are one base where both are there, so that each base can be
    left out alone without a change of units: W^1.4 / rowmean(W)^0.4 is W · (W / rowmean W)^0.4.
    """
    exponents: Exponents = {}
    for base, exponent in _flat(metric, 1.0):
        if base != _ONE:
            exponents[base] = exponents.get(base, 0.0) + exponent
    for base in list(exponents) if relative else ():
        match base:
            case Metric("rowmean" | "colmean", (m,)) if m in exponents and m.never_negative:
                exponent = exponents.pop(base)
                exponents[Metric("quot", (m, base))] = -exponent
                exponents[m] = round(exponents[m] + exponent, 6)
    return exponents


def factors_of(metric: Metric) -> Exponents:
    """Return the factors of a metric, bases with exponents other than 0.

    What is left of one whose layers compete, without some that have no units, has none either.
    """
    exponents = exponents_of(metric, relative=metric.is_comparable)
    return {base: exponent for base, exponent in exponents.items() if exponent}


def can_descend(metric: Metric) -> bool:
    """Whether the logarithm of a metric is a sum of its factors': none is negative anywhere."""
    return all(base.never_negative for base in exponents_of(metric, relative=False))


def product_of_powers(powers: Iterable[tuple[Metric, float]]) -> Metric:
    """Return the metric of some bases and their exponents; divisors of exponents below 0.

    A matrix has one power, whatever is relative to its means, and what varies along the same sides
    is multiplied first: a power of a matrix takes long, and the rest is computed on vectors.
    """
    flat: Exponents = {}
    for base, exponent in powers:
        parts = [(base, exponent)]
        if (mean := _mean_below(base)) and mean.shape != NUMBER:
            parts = [(base.operands[0], exponent), (mean, -exponent)]
        for part, share in parts:
            flat[part] = round(flat.get(part, 0.0) + share, 6)
    above, below = [], []
    for _, bases in groupby(sorted(filter(flat.get, flat), key=_sides), key=_sides):
        over, under = [], []
        for base in bases:
            exponent = flat[base]
            if exponent > 0 or base.name == "exp":
                over.append(_power(base, exponent))
            else:
                under.append(_power(base, -exponent))
        if over and under:
            above.append(Metric("quot", (product_of(over), product_of(under))))
        else:
            above += [product_of(over)] if over else []
            below += under
    return Metric("quot", (product_of(above), product_of(below))) if below else product_of(above)


def _mean_below(base: Metric) -> Metric | None:
    """Return the mean that a metric is relative to if it is its own."""
    match base:
        case Metric("quot", (x, Metric("rowmean" | "colmean", (y,)) as mean)) if x == y:
            return mean
    return None


def _sides(base: Metric) -> tuple[int, Shape]:
    return sum(base.shape), base.shape


def _power(base: Metric, exponent: float) -> Metric:
    if exponent == 1:
        return base
    if base.name != "exp":
        return powered(base, exponent)
    return Metric("exp", (Metric("mul", (Metric.constant(exponent), base.operands[0])),))


def _flat(metric: Metric, outer: float) -> list[tuple[Metric, float]]:
    base, exponent = as_power(metric)
    if base is not metric:
        parts = _flat(base, exponent * outer)
        if all(part.never_negative for part, _ in parts):
            return parts
        return [(base if base.never_negative else Metric("abs", (base,)), exponent * outer)]
    if (mean := _mean_below(metric)) and mean.shape == NUMBER:
        return [(metric, outer)]  # a vector on a scale of the layer's, which it keeps
    match metric:
        case Metric("mul" | "quot" as name, (x, y)):
            return _flat(x, outer) + _flat(y, outer if name == "mul" else -outer)
        case Metric("exp", (Metric("mul") as inner,)):
            factors = flat_product(inner)
            number = prod(x.value for x in factors if x.is_constant)
            inner = product_of([x for x in factors if not x.is_constant])
            return [(Metric("exp", (inner,)), number * outer)]
    return [(metric, outer)]


# Powers and products


def as_power(metric: Metric) -> tuple[Metric, float]:
    """Return x and c of a metric that is |x| ** c; of any other itself and 1."""
    match metric:
        case Metric(name, (x, exponent)) if name == POWER and exponent.is_constant:
            return x, exponent.value
        case Metric(name, (x,)) if name in POWERS and (name != "cube" or x.never_negative):
            return x, POWERS[name]
    return metric, 1.0


def powered(metric: Metric, exponent: float) -> Metric:
    """Return |x| ** c of a metric x, as short as the language allows."""
    if exponent == 1:
        return metric if metric.never_negative else Metric("abs", (metric,))
    if name := {0.5: "sqrt", 2.0: "sqr"}.get(exponent):
        return Metric(name, (metric,))
    return Metric(POWER, (metric, Metric.constant(exponent)))


def flat_product(node: Metric) -> list[Metric]:
    """Return what a product multiplies; of any other metric itself."""
    return [x for y in node.operands for x in flat_product(y)] if node.name == "mul" else [node]


def product_of(factors: Sequence[Metric]) -> Metric:
    """Return the product of some metrics; 1 of none."""
    return reduce(lambda x, y: Metric("mul", (x, y)), factors) if factors else _ONE
