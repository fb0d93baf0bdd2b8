"""Ablation: a formula without each of its factors, or without several."""

from collections.abc import Collection
from functools import reduce

from prunevolve.pruning.metric import Metric

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
    rests = {factor.text: without(metric, {factor.text}) for factor in factors_of(metric)}
    return {text: rest for text, rest in rests.items() if not rest.problem}


def without(metric: Metric, texts: Collection[str]) -> Metric:
    """Return what is left of a product without the factors of these texts."""
    others = [factor for factor in factors_of(metric) if factor.text not in texts]
    return reduce(_times, sorted(others, key=_is_divisor), _ONE)


def _times(metric: Metric, factor: Metric) -> Metric:
    if _is_divisor(factor):
        return Metric("quot", (metric, factor.operands[1]))
    return factor if metric == _ONE else Metric("mul", (metric, factor))


def _inverse(metric: Metric) -> Metric:
    return metric.operands[1] if _is_divisor(metric) else Metric("quot", (_ONE, metric))


def _is_divisor(metric: Metric) -> bool:
    return metric.name == "quot" and metric.operands[0] == _ONE
