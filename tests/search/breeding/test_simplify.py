"""Every rewrite leaves the mask unchanged, in every comparison group, on random trees."""

import random
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunevolve.pruning.masks import group_of
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding.simplify import simplify

NUMBERS = (0, 0.25, 0.3, 1, 2, 7.5, -1, -0.6, -3)
RARE = ("quot", "mms", "neg", "skp", "abs", "sqrt", "sqr", "mul", "add", "sub", "cube")
"""Operators of the rewrites, drawn more often so that random trees meet each rewrite."""


def random_tree(generator: random.Random, depth: int) -> Metric:
    if depth == 0 or generator.random() < 0.15:
        if generator.random() < 0.3:
            return Metric.constant(generator.choice(NUMBERS))
        return Metric(generator.choice(list(TERMINALS)))
    name = generator.choice([*OPERATORS, *RARE])
    operands = [random_tree(generator, depth - 1) for _ in range(OPERATORS[name].arity)]
    return Metric(name, tuple(operands))


def random_metric(seed: int, depth: int) -> Metric:
    generator = random.Random(seed)
    while (metric := random_tree(generator, depth)).problem:
        pass
    return metric


SCALES = {"G": 2.0, "X": 5.0, "V": 2.0, "B": 3.0, "M": 2.0}
"""Of terminals; 1 for all others."""


@cache
def terminals_of(seed: int) -> list[dict[str, torch.Tensor]]:
    """Leaves of two layers on different scales; no two values near each other."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, scale: float) -> torch.Tensor:
        terminal = TERMINALS[name]
        size = (6 if terminal.shape[0] else 1, 8 if terminal.shape[1] else 1)
        values = torch.rand(*size, generator=generator) * scale + 0.01
        # A signed terminal has as many values on either side of 0.
        return values - scale / 2 if terminal.signed else values

    return [
        {name: draw(name, SCALES.get(name, weights if name == "W" else 1.0)) for name in TERMINALS}
        for weights in (1.0, 3.0)
    ]


def _is_tied(scores: torch.Tensor) -> bool:
    """Tell whether rounding could decide: ties fall by position, near ties by the last bit."""
    if not torch.isfinite(scores).all():
        return True
    ordered = scores.double().flatten().sort().values
    gaps = ordered.diff() / ordered[1:].abs().clamp_min(1e-30)
    return bool((gaps < 1e-5).any())


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 50), st.sampled_from(["row", "layer", "model"]))
def test_simplify_keeps_the_mask(tree_seed, tensor_seed, group):
    metric = random_metric(tree_seed, 4)
    simplified = simplify(Criterion(metric, group))
    simpler = simplified.metric
    assert simplified.group == group
    assert not simpler.problem
    assert simpler.size <= metric.size
    assert simplify(simplified) == simplified
    layers = terminals_of(tensor_seed)
    scores = [[one.score(**terminals) for terminals in layers] for one in (metric, simpler)]
    if not any(map(_is_tied, chain(*scores))):
        fractions = dict.fromkeys(range(2), 0.5)
        masks = [dict(group_of(group).select(both.__getitem__, fractions)) for both in scores]
        for layer, mask in masks[0].items():
            assert torch.equal(mask, masks[1][layer]), (metric.text, simpler.text)


@pytest.mark.parametrize(
    ("text", "group", "expected"),
    [
        ("sqrt(sqr(sub(W, G)))", "row", "abs(sub(W, G))"),
        ("add(mul(W, W), G)", "row", "add(G, sqr(W))"),
        ("div(mul(W, G), X)", "layer", "mul(G, W)"),
        ("div(mul(W, G), X)", "model", "div(mul(G, W), X)"),
        ("mul(abs(mul(W, W)), mms(G))", "row", "mul(mms(G), sqr(W))"),
        ("neg(mul(2, G))", "row", "neg(G)"),
        ("quot(W, -4)", "row", "neg(W)"),
        ("mul(0, W)", "row", "mul(0, W)"),
        ("sqrt(mul(3, add(2, cube(W))))", "row", "W"),
        ("add(W, mul(2, mul(G, 3)))", "row", "add(W, mul(6, G))"),
        ("add(W, sub(X, mul(2, G)))", "row", "add(W, add(X, mul(-2, G)))"),
        ("add(W, mul(1e30, mul(1e30, G)))", "row", "add(W, mul(1e+30, mul(1e+30, G)))"),
        ("mul(W, quot(add(0, X), 1))", "row", "mul(W, X)"),
        ("quot(neg(W), rowsum(neg(G)))", "row", "neg(quot(W, neg(rowsum(G))))"),
        ("exp(log(W))", "row", "exp(log(W))"),
        ("exp(sqrt(sqrt(W)))", "row", "exp(power(W, 0.25))"),
        ("exp(power(power(M, 1.5), 0.3))", "row", "exp(power(M, 0.45))"),
        ("exp(power(sqr(W), 0.25))", "row", "exp(sqrt(W))"),
        ("mul(mul(W, G), mul(sqrt(W), pow15(G)))", "row", "mul(power(G, 2.5), power(W, 1.5))"),
        ("mul(mul(W, M), mul(sqr(M), W))", "row", "mul(mul(M, sqr(W)), sqr(M))"),
        ("mul(G, power(power(W, 2), -0.3))", "row", "mul(G, power(sqr(W), -0.3))"),
        ("power(mul(W, G), 0.7)", "row", "mul(G, W)"),
    ],
)
def test_simplify_collapses_opposing_operations(text, group, expected):
    assert simplify(Criterion.parse(text, group)).text == expected
