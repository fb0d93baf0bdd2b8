"""An allocation that is fitted to a model: at its best, the next weight costs each layer the same.

What removing weights costs is asked of the pruned model, not of the dense one: by the gradient of
its loss on calibration windows, over those weights of each layer that would go next or come back
first. Layers where they cost more than elsewhere then lose fewer; how far to go is decided by the
loss on windows held back.
"""

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from prunevolve.pruning.allocation import shifted, whole_counts
from prunevolve.pruning.leaves import GRADIENT, Statistics
from prunevolve.pruning.masks import Target
from prunevolve.pruning.ranking import Score
from prunevolve.pruning.recipe import Shapes

MOST_ROUNDS = 8
"""Gradients are computed at most so often."""

MOST_TRIALS = 3
"""Steps tried in a round, each half as long as the one before."""

MOST_WALKS = 1 + MOST_ROUNDS * (2 + MOST_TRIALS)
"""A trial is a walk over the blocks, gradients are two."""

_BAND = 0.025
"""Weights that rank so close to the threshold, as a fraction of their group, count as the next."""

_FIRST_STEP = {False: 0.02, True: 0.2}
"""How far a layer moves whose cost is a standard deviation above the mean: in the fraction that it
loses, or under a threshold over the whole model in the logarithm of its factor."""

_MOST_DEVIATIONS = 2.0
_LEAST_GAIN = 0.001
"""A step pays if the loss falls by this, in nats per token; less is noise of the windows."""

Shares = Mapping[str, float]


def fit(
    shapes: Shapes,
    target: Target,
    loss: Callable[[Shares], float],
    costs: Callable[[Shares], Mapping[str, float]],
) -> dict[str, float]:
    """Return fitted shares of the layers: fractions, or for the group model factors.

    Args:
        shapes: Of each layer's weight, by block and layer.
        loss: Returns the loss on the windows held back of the model pruned with some shares.
        costs: Returns for each layer what one more weight costs at some shares.
    """
    sizes = {layer: math.prod(s) for layers in shapes.values() for layer, s in layers.items()}
    by_factors = target.group.whole_model
    shares = dict.fromkeys(sizes, 1.0 if by_factors else target.sparsity)
    best, step = loss(shares), _FIRST_STEP[by_factors]

    def moved(directions: Mapping[str, float]) -> dict[str, float]:
        if by_factors:
            return {name: shares[name] * math.exp(step * directions[name]) for name in shares}
        wanted = {name: shares[name] - step * directions[name] for name in shares}
        return whole_counts(shifted(wanted, sizes, target.sparsity), shapes, target)

    for _ in range(MOST_ROUNDS):
        directions = _standardized(costs(shares), sizes)
        for _ in range(MOST_TRIALS):
            tried = moved(directions)
            if (now := loss(tried)) < best - _LEAST_GAIN:
                shares, best, step = tried, now, 2 * step
                break
            step /= 2
        else:
            return shares
    return shares


def _standardized(costs: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return how many standard deviations each layer is above the mean over all weights."""
    total = sum(sizes.values())
    mean = math.fsum(sizes[name] * cost for name, cost in costs.items()) / total
    squares = math.fsum(sizes[name] * (cost - mean) ** 2 for name, cost in costs.items())
    deviation = math.sqrt(squares / total) or 1.0
    most = _MOST_DEVIATIONS
    return {n: max(-most, min(most, (cost - mean) / deviation)) for n, cost in costs.items()}


class Costs:
    """What one more weight would cost in each layer, from the gradients of a pruned model.

    Args:
        weight: Returns a layer's dense weight.
        score: Computes a layer's scores, times its factor if there are factors.
        fractions: What each layer loses, in the order in which the layers come.

    Attributes:
        by_layer: The costs so far, in the loss's unit times `GRADIENT_FACTOR`.
    """

    def __init__(
        self,
        weight: Callable[[str], Tensor],
        score: Score,
        fractions: Mapping[str, float],
        target: Target,
    ) -> None:
        self._weight = weight
        low = {layer: max(0.0, fraction - _BAND) for layer, fraction in fractions.items()}
        high = {layer: min(0.999, fraction + _BAND) for layer, fraction in fractions.items()}
        self._masks = [target.group.select(score, each) for each in (low, high)]
        self.by_layer: dict[str, float] = {}

    def add(self, statistics: Statistics) -> None:
        """Take the next layers' gradients."""
        for layer, gradient in statistics.get(GRADIENT, {}).items():
            (_, fewer), (name, more) = map(next, self._masks)
            assert name == layer, (name, layer)
            band = more & ~fewer
            # To first order, setting a weight to zero changes the loss by minus it times this.
            self.by_layer[layer] = -float((self._weight(layer).float() * gradient)[band].mean())
