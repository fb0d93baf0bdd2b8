"""Products: all that are drawn or bred are within the limits; a metric read as one and written."""

from functools import cache

import pytest
import torch
from toy_metrics import random_terminals

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding.factors import MAX_FACTORS, factors_for
from prunevolve.search.breeding.product import factors_of, product_of_powers
from prunevolve.search.breeding.variation import Breeder, seeded

ALL = list(TERMINALS)
CORE = {Metric("W"): 1.0, Metric("G"): 1.0}


@cache
def products(group="model", units="required", terminals="", **changes):
    named = {"terminals": list(terminals)} if terminals else {}
    return Breeder(Search(units=units, **named, **changes), group).varied


def family(seed, made):
    with seeded(seed):
        first, second = made.random(), made.random()
    with seeded(seed, 1):
        return first, second, made.child(first)


SETTINGS: dict[str, dict[str, str]] = {
    "comparable": {},
    "all terminals": {"terminals": "".join(ALL)},
    "no gradient": {"terminals": "WXV"},
    "weights alone": {"terminals": "W"},
    "row": {"group": "row"},
    "row without a gradient": {"group": "row", "terminals": "WX"},
    "layer": {"group": "layer"},
    "units off": {"units": "off"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_products_and_children_are_within_the_limits_and_parents_unchanged(settings):
    made, different = products(**settings), 0
    for seed in range(500):
        first, second, child = family(seed, made)
        for metric in (first, second, child):
            assert metric.is_comparable or not made.comparable
            assert metric.terminals <= set(settings.get("terminals", "WGXVHM"))
            assert not metric.problem
            assert 1 <= len(factors_of(metric)) <= MAX_FACTORS
        different += child not in (first, second)
        if seed % 4 == 0:
            assert family(seed, made) == (first, second, child)
    assert different > 230


def by_mean(terminal):
    return f"quot(sqrt({terminal}), rowmean(sqrt({terminal})))"


VECTORS = f"mul(sqrt({by_mean('X')}), quot({by_mean('V')}, {by_mean('H')}))"
PRODUCT = factors_of(Metric.parse(f"mul(mul(W, G), {VECTORS})"))


def mutated(kind, seed, product=PRODUCT):
    product = dict(product)
    with seeded(seed):
        products()._mutate(product, kind)
    return product


@pytest.mark.parametrize(
    ("kind", "lengths"), [("add", {5, 6}), ("remove", {4}), ("exchange", {4, 5}), ("vary", {5})]
)
def test_mutations_change_one_factor_and_leave_the_core(kind, lengths):
    several = [mutated(kind, seed) for seed in range(60)]
    assert {len(product) for product in several} == lengths
    for product in several:
        assert product.items() >= CORE.items()
        assert sum(PRODUCT.get(base) != product.get(base) for base in PRODUCT) <= 2
    assert len({tuple(product.items()) for product in several}) >= 3


def test_table_has_the_factors_of_the_terminals_that_may_be_in_it():
    texts = [factor.text for factor in factors_for("WX", "model")]
    assert texts == ["quot(W, rowmean(W))", "quot(W, colmean(W))", "divrms(X, X)", by_mean("X")]
    assert len(factors_for(ALL, "model")) == 15


def test_table_leaves_out_what_is_the_same_for_all_that_compete():
    left_out = {
        group: {x.text for x in factors_for(ALL, "model") if x not in factors_for(ALL, group)}
        for group in ("layer", "row")
    }
    assert left_out["layer"] == set(map(by_mean, "XVH"))
    assert left_out["row"] == left_out["layer"] | {
        *("divrms(rowmean(mul(W, G)), mul(W, G))", "divrms(B, B)"),
        "exp(divrms(rowmean(quot(M, G)), rowmean(quot(M, G))))",
    }
    assert MATRIX in {factor.shape for factor in factors_for(ALL, "model")}


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
        ("mul(mul(W, G), exp(mul(0.3, V)))", {"W": 1, "G": 1, "exp(V)": 0.3}),
        # A score whose layers compete has no units, and none without a mean's power either.
        (RELATIVE, {"G": 1, "quot(W, rowmean(W))": 0.4, "W": 1}),
        ("quot(W, colmean(W))", {"quot(W, colmean(W))": 1}),
        (f"quot(W, power({by_mean('X')}, 0.3))", {"W": 1, by_mean("X"): -0.3}),
        ("quot(power(W, 1.4), power(rowmean(W), 0.1))", {"W": 1.4, "rowmean(W)": -0.1}),
    ],
)
def test_factors_of_are_those_of_a_product(text, factors):
    assert named(factors_of(Metric.parse(text))) == pytest.approx(factors)


def test_product_of_powers_gives_the_scores_of_the_factors_and_one_power_a_matrix():
    search, terminals = Search(terminals=["W", "G", "X", "V"]), random_terminals(6, 8)
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
