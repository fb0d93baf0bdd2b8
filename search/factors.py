"""What a search learned: the factors of its formulas, and which of them the good ones share."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce

from prunevolve.pruning.metric import Metric
from prunevolve.search.population import Record

BEST = 0.1
"""Share of the evaluated candidates that counts as good."""

_ONE = Metric.constant(1)


def factors_of(metric: Metric) -> tuple[Metric, ...]:
    """Return the factors whose product a metric is, divisors as `quot(1, x)`."""
    if metric.name == "mul":
        return factors_of(metric.operands[0]) + factors_of(metric.operands[1])
    if metric.name == "quot":
        return factors_of(metric.operands[0]) + tuple(map(_inverse, factors_of(metric.operands[1])))
    return () if metric == _ONE else (metric,)


def without_each(metric: Metric) -> dict[str, Metric]:
    """Return what is left of a product without each of its factors, by the factor's text.

    Without those that it cannot rank weights without.
    """
    factors = factors_of(metric)
    rests = {}
    for place, factor in enumerate(factors):
        rest = _product_of([*factors[:place], *factors[place + 1 :]])
        if not rest.problem:
            rests[factor.text] = rest
    return rests


def _product_of(factors: Sequence[Metric]) -> Metric:
    return reduce(_times, sorted(factors, key=_is_divisor), _ONE)


def _times(metric: Metric, factor: Metric) -> Metric:
    if _is_divisor(factor):
        return Metric("quot", (metric, factor.operands[1]))
    return factor if metric == _ONE else Metric("mul", (metric, factor))


def _inverse(metric: Metric) -> Metric:
    return metric.operands[1] if _is_divisor(metric) else Metric("quot", (_ONE, metric))


def _is_divisor(metric: Metric) -> bool:
    return metric.name == "quot" and metric.operands[0] == _ONE


# What the good have that the others have not


def shared_by_the_best(records: Sequence[Record], most: int = 12) -> list[tuple[str, ...]]:
    """Return the parts that are the most frequent in the best tenth, compared with the rest.

    The rest are all other candidates that were measured, those that were stopped early, too.

    Returns:
        Rows of a kind of part, the part, and how many of the best and of the rest have it; those
        first in which the shares differ most.
    """
    measured = [r for r in records if r.outcome.kind in ("evaluated", "stopped")]
    evaluated = sorted((r for r in measured if r.fitness is not None), key=lambda r: r.rank)
    best = evaluated[: max(1, round(BEST * len(evaluated)))]
    indices = {record.index for record in best}
    rest = [record for record in measured if record.index not in indices]
    among_best, among_rest = _counts(best), _counts(rest)

    def gain(part: tuple[str, str]) -> float:
        return among_best[part] / len(best) - among_rest[part] / max(1, len(rest))

    parts = sorted(among_best, key=lambda part: (-gain(part), part))
    return [
        (*part, f"{among_best[part]} of {len(best)}", f"{among_rest[part]} of {len(rest)}")
        for part in parts[:most]
        if gain(part) > 0
    ]


def _counts(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    return Counter(part for record in records for part in set(_parts(record.criterion.metric)))


def _parts(metric: Metric) -> Iterator[tuple[str, str]]:
    yield from (("leaf", name) for name in metric.leaves)
    yield from (("operator", node.name) for node in metric.nodes() if node.operands)
    for factor in factors_of(metric):
        if factor.operands:
            yield "factor", _form(factor)
    if metric.is_comparable:
        yield "units", "none"


def _form(metric: Metric) -> str:
    """Return the text with `c` for each number but a dividend of 1."""
    if metric.is_constant:
        return "c"
    if _is_divisor(metric):
        return f"quot(1, {_form(metric.operands[1])})"
    if not metric.operands:
        return metric.name
    return f"{metric.name}({', '.join(map(_form, metric.operands))})"
