"""Formulas are taken apart into factors."""

import pytest
import torch

from prunevolve.pruning.metric import Metric
from prunevolve.search.ablation import factors_of, without, without_each


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("mul(mul(W, G), exp(X))", ["W", "G", "exp(X)"]),
        ("quot(mul(W, G), quot(rowmean(W), V))", ["W", "G", "quot(1, rowmean(W))", "V"]),
        ("quot(1, mul(W, G))", ["quot(1, W)", "quot(1, G)"]),
        ("add(W, mul(W, G))", ["add(W, mul(W, G))"]),
        # A score whose layers compete has no units, and none without a mean's power either.
        (
            "quot(mul(power(W, 1.4), G), power(rowmean(W), 0.4))",
            ["W", "G", "quot(power(W, 0.4), power(rowmean(W), 0.4))"],
        ),
    ],
)
def test_factors_of_are_those_of_a_product(text, factors):
    assert [factor.text for factor in factors_of(Metric.parse(text))] == factors


def test_without_each_is_the_metric_divided_by_the_factor():
    metric = Metric.parse("quot(mul(mul(W, G), exp(V)), quot(rowmean(W), sqrt(X)))")
    generator = torch.Generator().manual_seed(0)
    sizes = {"W": (3, 4), "G": (3, 4), "V": (1, 4), "X": (1, 4)}
    terminals = {name: torch.rand(*size, generator=generator) + 0.1 for name, size in sizes.items()}
    rests = without_each(metric)
    assert list(rests) == ["W", "G", "exp(V)", "quot(1, rowmean(W))", "sqrt(X)"]
    for factor, rest in rests.items():
        product = rest.score(**terminals) * Metric.parse(factor).score(**terminals)
        assert torch.allclose(product, metric.score(**terminals), rtol=1e-5)


def test_without_each_leaves_out_what_it_cannot_rank_without():
    assert list(without_each(Metric.parse("mul(W, sqrt(X))"))) == ["sqrt(X)"]
    assert without_each(Metric.parse("W")) == {}


def test_without_leaves_several_factors_out():
    metric = Metric.parse("quot(mul(mul(W, G), exp(V)), mul(rowmean(W), sqrt(X)))")
    assert without(metric, ["G", "quot(1, rowmean(W))"]).text == "mul(quot(exp(V), sqrt(X)), W)"
    assert without(metric, []) == without(without(metric, []), [])
