"""What a search learned: the factors of its formulas, and which of them the good ones share."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce

from prunevolve.pruning.metric import Metric
from prunevolve.search.population import Record

_BEST, _MOST_ROWS = 0.1, 12
"""The share of the evaluated candidates that counts as good; the most parts that are listed."""

_ONE = Metric.constant(1)


def factors_of(metric: Metric) -> tuple[Metric, ...]:
    """Return the factors whose product a metric is, divisors as `quot(1, x)`."""
    if metric.name not in ("mul", "quot"):
        return () if metric == _ONE else (metric,)
    left, right = map(factors_of, metric.operands)
    return left + (right if metric.name == "mul" else tuple(map(_inverse, right)))


def without_each(metric: Metric) -> dict[str, Metric]:
    """Return what is left of a product without each of its factors, by the factor's text.

    Factors that it cannot rank weights without are left out.
    """
    factors = factors_of(metric)
    rests = {}
    for place, factor in enumerate(factors):
        others = sorted((*factors[:place], *factors[place + 1 :]), key=_is_divisor)
        rest = reduce(_times, others, _ONE)
        if not rest.problem:
            rests[factor.text] = rest
    return rests


def _times(metric: Metric, factor: Metric) -> Metric:
    if _is_divisor(factor):
        return Metric("quot", (metric, factor.operands[1]))
    return factor if metric == _ONE else Metric("mul", (metric, factor))


def _inverse(metric: Metric) -> Metric:
    return metric.operands[1] if _is_divisor(metric) else Metric("quot", (_ONE, metric))


def _is_divisor(metric: Metric) -> bool:
    return metric.name == "quot" and metric.operands[0] == _ONE


def shared_by_the_best(records: Sequence[Record]) -> list[tuple[str, str, str, str]]:
    """Return the parts that are more frequent in the best tenth than in the rest.

    The rest are all other candidates that were measured, those that were stopped early, too.

    Returns:
        Rows of a kind of part, how many of the best and of the rest have it, and the part; those
        first in which the shares differ most.
    """
    evaluated = sorted((r for r in records if r.fitness is not None), key=lambda r: r.rank)
    best = evaluated[: max(1, round(_BEST * len(evaluated)))]
    rest = evaluated[len(best) :] + [r for r in records if r.outcome.kind == "stopped"]
    in_best, in_rest = _counts(best), _counts(rest)
    gains = {
        part: count / len(best) - in_rest[part] / max(1, len(rest))
        for part, count in in_best.items()
    }
    most = sorted(gains, key=lambda part: (-gains[part], part))[:_MOST_ROWS]
    return [
        (part[0], f"{in_best[part]} of {len(best)}", f"{in_rest[part]} of {len(rest)}", part[1])
        for part in most
        if gains[part] > 0
    ]


def _counts(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    return Counter(part for record in records for part in set(_parts(record.criterion.metric)))


def _parts(metric: Metric) -> Iterator[tuple[str, str]]:
    yield from (("statistic", name) for name in metric.leaves)
    yield from (("operator", node.name) for node in metric.nodes() if node.operands)
    yield from (("factor", _form(factor)) for factor in factors_of(metric) if factor.operands)
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
