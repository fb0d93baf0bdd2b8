"""Ablation: a formula without each of its factors, or without several."""

from collections.abc import Collection

from prunevolve.pruning.metric import Metric
from prunevolve.search.breeding.product import exponents_of, product_of_powers


def factors_of(metric: Metric) -> tuple[Metric, ...]:
    """Return the factors whose product a metric is, divisors as `quot(1, x)`."""
    return tuple(product_of_powers([factor]) for factor in _powers(metric))


def without_each(metric: Metric) -> dict[str, Metric]:
    """Return what is left of a product without each of its factors, by the factor's text.

    Factors that it cannot rank weights without are left out.
    """
    rests = {factor.text: without(metric, {factor.text}) for factor in factors_of(metric)}
    return {text: rest for text, rest in rests.items() if not rest.problem}


def without(metric: Metric, texts: Collection[str]) -> Metric:
    """Return what is left of a product without the factors of these texts."""
    powers = _powers(metric)
    return product_of_powers([x for x in powers if product_of_powers([x]).text not in texts])


def _powers(metric: Metric) -> list[tuple[Metric, float]]:
    # What is left of a product whose layers compete still has no units.
    exponents = exponents_of(metric, relative=metric.is_comparable)
    return [power for power in exponents.items() if power[1]]
