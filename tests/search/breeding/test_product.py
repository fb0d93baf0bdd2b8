"""A metric read as a product of powers, and written from one."""

import pytest
import torch

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Metric
from prunevolve.search.breeding.product import (
    ablations,
    exponents_of,
    factors_of,
    product_of_powers,
)
from prunevolve.search.breeding.variation import Breeder, seeded


def named(exponents):
    return {base.text: exponent for base, exponent in exponents.items()}


RELATIVE = "quot(mul(power(W, 1.4), G), power(rowmean(W), 0.4))"


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("mul(mul(W, G), exp(X))", {"W": 1, "G": 1, "exp(X)": 1}),
        ("quot(mul(W, G), mul(exp(V), sqrt(V)))", {"W": 1, "G": 1, "exp(V)": -1, "V": -0.5}),
        ("mul(W, mul(W, quot(G, W)))", {"W": 1, "G": 1}),
        ("mul(W, quot(G, G))", {"W": 1}),  # an exponent of 0 is none
        ("quot(1, mul(W, G))", {"W": -1, "G": -1}),
        ("add(W, mul(W, G))", {"add(W, mul(W, G))": 1}),
        ("power(mul(W, sqr(G)), 0.3)", {"W": 0.3, "G": 0.6}),
        ("sqr(mul(W, M))", {"abs(mul(W, M))": 2}),  # of two signs
        ("mul(mul(W, G), exp(mul(0.3, D)))", {"W": 1, "G": 1, "exp(D)": 0.3}),
        # A score whose layers compete has no units, and none without a mean's power either.
        (RELATIVE, {"G": 1, "quot(W, rowmean(W))": 0.4, "W": 1}),
        ("quot(W, colmean(W))", {"quot(W, colmean(W))": 1}),
        ("quot(power(W, 1.4), power(rowmean(W), 0.1))", {"W": 1.4, "rowmean(W)": -0.1}),
    ],
)
def test_factors_of_are_those_of_a_product(text, factors):
    assert named(factors_of(Metric.parse(text))) == pytest.approx(factors)


def test_exponents_of_are_relative_only_if_wanted():
    assert named(exponents_of(Metric.parse(RELATIVE), relative=False)) == {
        "W": 1.4,
        "G": 1,
        "rowmean(W)": -0.4,
    }


def test_product_of_powers_gives_the_scores_of_the_factors_and_one_power_a_matrix():
    search, generator = Search(terminals=["W", "G", "X", "V"]), torch.Generator().manual_seed(0)
    sizes = {"W": (6, 8), "G": (6, 8), "X": (1, 8), "V": (1, 8)}
    terminals = {name: torch.rand(size, generator=generator) + 0.1 for name, size in sizes.items()}
    checked = 0
    for group in ("model", "row"):
        for seed in range(100):
            with seeded(seed):
                metric = Breeder(search, group).varied.random()
            factors = factors_of(metric)
            made = product_of_powers(factors.items())
            assert Breeder(search, group).comparable <= made.is_comparable
            scores = torch.ones(6, 8)
            for base, exponent in factors.items():
                scores = scores * base.score(**terminals) ** exponent
            if scores.isfinite().all() and (scores > 1e-6).all():
                torch.testing.assert_close(made.score(**terminals), scores, rtol=1e-3, atol=0)
                checked += 1
    assert checked > 150


@pytest.mark.parametrize(
    ("text", "base", "rest"),
    [
        ("mul(mul(W, G), exp(X))", "exp(X)", "mul(W, G)"),
        ("quot(mul(W, G), divrms(V, V))", "divrms(V, V)", "mul(W, G)"),
        (RELATIVE, "quot(W, rowmean(W))", "mul(W, G)"),
    ],
)
def test_rest_is_the_metric_divided_by_the_factor(text, base, rest):
    assert ablations(Metric.parse(text), comparable=False)[Metric.parse(base)].text == rest


@pytest.mark.parametrize(
    ("text", "comparable", "rests"),
    [
        ("mul(W, sqrt(X))", False, ["X"]),
        ("W", False, []),
        ("mul(mul(W, G), exp(X))", False, ["W", "G", "exp(X)"]),
        ("mul(mul(W, G), exp(X))", True, ["exp(X)"]),
        ("mul(mul(W, G), divrms(X, X))", True, ["divrms(X, X)"]),  # W and G only together
        (RELATIVE, True, ["quot(W, rowmean(W))"]),
    ],
)
def test_rests_are_of_factors_without_which_weights_can_be_ranked_and_compared(
    text, comparable, rests
):
    found = ablations(Metric.parse(text), comparable)
    assert [base.text for base in found] == rests
    for base, rest in found.items():
        others = {x: c for x, c in factors_of(Metric.parse(text)).items() if x != base}
        assert factors_of(rest) == others
