"""The fit of an allocation: costs of the next weights, and steps that make them equal."""

import math

import pytest
import torch

from prunevolve.pruning.fitted import MOST_ROUNDS, MOST_TRIALS, Costs, fit
from prunevolve.pruning.leaves import GRADIENT, Statistics
from prunevolve.pruning.masks import Layer, Model, Row, Target

SHAPES = {"block.0": {"a": (8, 20), "b": (4, 40)}, "block.1": {"c": (8, 40)}}
SIZES = {layer: math.prod(shape) for layers in SHAPES.values() for layer, shape in layers.items()}
BEST = {"a": 0.4, "b": 0.5, "c": 0.55}
"""Its mean over all weights is a half."""


@pytest.mark.parametrize("group", [Row(), Layer()])
def test_fit_moves_shares_to_where_all_costs_are_equal(group):
    def loss(shares):
        return sum(SIZES[name] * (shares[name] - BEST[name]) ** 2 for name in SIZES)

    def costs(shares):
        return {name: 2 * (shares[name] - BEST[name]) for name in SIZES}

    target = Target(0.5, group)
    shares = fit(SHAPES, target, loss, costs)
    assert shares == pytest.approx(BEST, abs=0.06)
    assert loss(shares) < loss(dict.fromkeys(SIZES, 0.5)) / 4
    removed = sum(SIZES[name] * shares[name] for name in SIZES)
    assert removed == pytest.approx(0.5 * sum(SIZES.values()), abs=8)


def test_fit_moves_factors_up_where_removing_costs_more():
    best = {"a": 2.0, "b": 1.0, "c": 0.7}

    def costs(factors):
        return {name: math.log(best[name] / factors[name]) for name in best}

    def loss(factors):
        return sum(cost**2 for cost in costs(factors).values())

    factors = fit(SHAPES, Target(0.5, Model()), loss, costs)
    assert loss(factors) < loss(dict.fromkeys(best, 1.0)) / 4
    assert factors["a"] > factors["b"] > factors["c"]


def test_fit_ends_where_no_step_pays():
    asked = {"loss": 0, "costs": 0}

    def loss(shares):
        asked["loss"] += 1
        return 1.0 if set(shares.values()) == {0.5} else 2.0

    def costs(shares):
        asked["costs"] += 1
        return {"a": 1.0, "b": 0.0, "c": -1.0}

    assert fit(SHAPES, Target(0.5, Layer()), loss, costs) == dict.fromkeys(SIZES, 0.5)
    assert asked == {"loss": 1 + MOST_TRIALS, "costs": 1}


def test_fit_is_bounded():
    losses = iter(range(100, 0, -1))
    asked = []

    def costs(shares):
        asked.append(shares)
        return {"a": 1.0, "b": 0.0, "c": -1.0}

    fit(SHAPES, Target(0.5, Layer()), lambda shares: float(next(losses)), costs)
    assert len(asked) == MOST_ROUNDS


@pytest.mark.parametrize("group", [Row(), Layer(), Model()])
def test_costs_are_those_of_the_weights_around_the_threshold(group):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for layers in SHAPES.values() for name, shape in layers.items()}
    weights = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    gradients = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    order = ["c", "b", "a"]  # the way back
    costs = Costs(
        weights.__getitem__,
        lambda name: weights[name].abs(),
        dict.fromkeys(order, 0.5),
        Target(0.5, group),
    )
    for name in order:
        costs.add(Statistics({GRADIENT: {name: gradients[name]}}))
        costs.add(Statistics())  # of the layers' inputs, of which nothing is asked
    everything = torch.cat([weights[name].abs().flatten() for name in order])
    for name in order:
        scores = weights[name].abs()
        among = {"row": scores, "layer": scores.reshape(1, -1), "model": everything.reshape(1, -1)}
        rivals = among[group.name]
        lowest, highest = (int(x * rivals.shape[1]) for x in (0.475, 0.525))
        ranked = rivals.sort(dim=1).values
        low, high = ranked[:, lowest - 1 : lowest], ranked[:, highest - 1 : highest]
        band = (scores > low) & (scores <= high)
        assert band.any()
        expected = -(weights[name] * gradients[name])[band].mean()
        assert costs.by_layer[name] == pytest.approx(float(expected))
