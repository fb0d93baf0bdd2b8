"""Repair of a metric whose scores cannot be compared between layers: `Metric.units` says why."""

import random
from itertools import product

from pruning.metric import Metric
from pruning.operators import OPERATORS

_POWERS = {"sqrt": 1 / 2, "root4": 1 / 4, "sqr": 2.0, "pow15": 3 / 2, "cube": 3.0}

_MADE_BY: dict[float, tuple[str, ...]] = {
    **{a * b: (one, other) for (one, a), (other, b) in product(_POWERS.items(), repeat=2)},
    **{power: (name,) for name, power in _POWERS.items()},
    1.0: (),
}
"""Which operators make a power, at most two; the shortest way."""

_MEANS = {
    "w": ("rowmean(W)", "colmean(W)", "rowmean(G)", "colmean(G)"),
    "x": ("rowmean(X)",),
}
"""What can cancel a unit of weights or activations: means, which have no other unit."""


def without_units(metric: Metric) -> Metric | None:
    """Return the metric times what cancels its units; None if operands in it do not go together.

    Sums and norms become means, and a power of a mean, drawn from a few, is a factor or a divisor.
    Draws from the module `random`; see `search.breeding.variation.seeded`.
    """
    metric = _with_means(metric)
    try:
        units = metric.units
    except ValueError:
        return None
    for unit, means in _MEANS.items():
        if excess := getattr(units, unit):
            mean = Metric.parse(random.choice(means))
            power = excess / getattr(mean.units, unit)
            if abs(power) not in _MADE_BY:
                return None
            for name in _MADE_BY[abs(power)]:
                mean = Metric(name, (mean,))
            metric = Metric("quot" if power > 0 else "mul", (metric, mean))
    return metric if metric.is_comparable else None


def _with_means(metric: Metric) -> Metric:
    if not metric.operands:
        return metric
    name = OPERATORS[metric.name].twin or metric.name
    return Metric(name, tuple(map(_with_means, metric.operands)))
