"""Every rewrite leaves the mask unchanged, in every comparison group, on random trees."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import masks
from pruning.masks import Target
from pruning.metric import Metric
from pruning.operators import LEAF_SETS, RELEASE
from search import simplify as module
from search.simplify import never_negative, simplify


def random_tree(generator: random.Random, depth: int) -> Metric:
    if depth == 0 or generator.random() < 0.15:
        return Metric(generator.choice(LEAF_SETS["release"]))
    name = generator.choice(list(RELEASE))
    operands = [random_tree(generator, depth - 1) for _ in range(RELEASE[name].arity)]
    return Metric(name, tuple(operands))


def leaves_of(seed: int) -> list[dict[str, torch.Tensor]]:
    """Leaves of two layers on different scales; no two values near each other."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for scale in (1.0, 3.0):
        W = torch.rand(6, 8, generator=generator) * scale + 0.01
        G = torch.rand(6, 8, generator=generator) * 2 + 0.01
        X = torch.rand(1, 8, generator=generator) * 5 + 0.01
        layers.append({"W": W, "G": G, "X": X})
    return layers


def masks_of(metric: Metric, group: str, seed: int) -> dict[str, torch.Tensor] | None:
    scores = {f"layer{i}": metric.score(**leaves) for i, leaves in enumerate(leaves_of(seed))}
    scores = {name: s.expand(6, 8) for name, s in scores.items()}
    if any(_is_tied(s, group) for s in scores.values()):
        return None
    mask_of = masks.masker(Target(0.5, group), scores)
    return {name: mask_of(s) for name, s in scores.items()}


def _is_tied(scores: torch.Tensor, group: str) -> bool:
    """Tell whether rounding could decide: ties fall by position, near ties by the last bit."""
    if not torch.isfinite(scores).all():
        return True
    ordered = scores.double().flatten().sort().values
    gaps = ordered.diff() / ordered[1:].abs().clamp_min(1e-30)
    return bool((gaps < 1e-5).any())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 50), st.sampled_from(["row", "layer", "model"]))
def test_simplify_keeps_the_mask(tree_seed, tensor_seed, group):
    metric = random_tree(random.Random(tree_seed), 4)
    before = masks_of(metric, group, tensor_seed)
    if before is None:
        return
    simpler = simplify(metric, group)
    after = masks_of(simpler, group, tensor_seed)
    assert simpler.size <= metric.size
    if after is not None:
        for name, mask in before.items():
            assert torch.equal(mask, after[name]), (metric.text, simpler.text)


@pytest.mark.parametrize("rewrite", module.VALUE_PRESERVING, ids=lambda r: r.__name__)
def test_each_rewrite_keeps_the_value_wherever_it_applies(rewrite):
    applied = 0
    for seed in range(4000):
        metric = random_tree(random.Random(seed), 3)
        replacement = rewrite(metric)
        if replacement is None:
            continue
        applied += 1
        for leaves in leaves_of(seed % 7):
            was, now = metric.score(**leaves), replacement.score(**leaves)
            torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert applied >= 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(["row", "layer", "model"]))
def test_simplify_is_idempotent(tree_seed, group):
    once = simplify(random_tree(random.Random(tree_seed), 5), group)
    assert simplify(once, group) == once


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_never_negative_holds_on_tensors(tree_seed):
    metric = random_tree(random.Random(tree_seed), 4)
    if never_negative(metric):
        score = metric.score(**leaves_of(tree_seed % 5)[0])
        assert not (score < 0).any()


@pytest.mark.parametrize(
    ("text", "group", "expected"),
    [
        ("neg(neg(W))", "row", "W"),
        ("skp(mul(W, skp(G)))", "row", "mul(G, W)"),
        ("sub(W, neg(G))", "row", "add(G, W)"),
        ("sqrt(sqr(sub(W, G)))", "row", "abs(sub(W, G))"),
        ("mul(W, W)", "row", "W"),
        ("add(mul(W, W), G)", "row", "add(G, sqr(W))"),
        ("mms(mul(W, G))", "row", "mul(G, W)"),
        ("mms(mul(W, G))", "model", "mms(mul(G, W))"),
        ("div(mul(W, G), X)", "layer", "mul(G, W)"),
        ("div(mul(W, G), X)", "model", "div(mul(G, W), X)"),
        ("mul(abs(mul(W, W)), mms(G))", "row", "mul(mms(G), sqr(W))"),
        ("mul(neg(W), neg(G))", "row", "mul(G, W)"),
        ("exp(log(W))", "row", "exp(log(W))"),
        ("tanh(W)", "row", "tanh(W)"),
    ],
)
def test_simplify_collapses_opposing_operations(text, group, expected):
    assert simplify(Metric.parse(text), group).text == expected
