"""One mask, one fingerprint; a metric that cannot prune is refused; the probe of a few rows."""

from functools import partial

import pytest
import torch
from refusals import refusal

from prunevolve.pruning.masks import WEIGHTS, NOfM, Row, Target, group_of
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.fingerprint import Fingerprints, Probe, take_probe, tensors_digest

HALF = Target(0.5, Row())
TWO_OF_FOUR = Target(0.5, NOfM(2, 4))
refused = partial(refusal, error=DegenerateScores)


def probe(seed=0, x_scale=1.0):
    """Two layers on different scales, of 6 rows; all terminals positive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator) + 0.1

    names = {"a": 1.0, "b": 3.0}
    weights = {f"W/{name}": draw(6, 16) * scale - 0.8 for name, scale in names.items()}
    X = {f"X/{name}": draw(1, 16) * x_scale for name in names}
    G = {f"G/{name}": draw(6, 16) for name in names}
    return Probe.from_tensors(weights | X | G)


def mark(text, target=HALF, on=None):
    marks = Fingerprints([(on or probe(), lambda group: target)])
    return marks.fingerprint(Criterion(Metric.parse(text), target.group.name))


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("W", "log(W)"),
        ("mul(W, sqrt(X))", "mul(X, sqr(W))"),
        ("mul(W, G)", "add(log(mul(W, G)), log(mul(W, G)))"),
        ("mul(W, G)", "zsn(mul(G, W))"),
    ],
)
def test_fingerprint_is_shared_by_formulas_of_one_order(one, other, target):
    assert mark(one, target) == mark(other, target)


def test_fingerprint_differs_where_the_mask_or_the_target_does():
    texts = ("W", "neg(W)", "G", "mul(W, G)", "add(W, G)", "mul(W, sqrt(X))", "sub(W, G)")
    assert len({mark(text) for text in texts}) == len(texts)
    targets = [
        *(Target(0.5, group_of(group)) for group in WEIGHTS),
        *(Target(0.25, Row()), TWO_OF_FOUR, Target(0.5, NOfM(4, 8))),
    ]
    assert len({mark("W", target) for target in targets}) == len(targets)


parse = Criterion.parse


def asking(sparsity):
    return lambda group: Target(sparsity, group_of(group))


def test_fingerprint_sees_a_difference_in_any_of_several_tasks():
    one = probe()
    other = Probe(one.layers, {**one.terminals, "X": probe(1).terminals["X"]})
    both = Fingerprints([(one, asking(0.5)), (other, asking(0.5))])
    again = Fingerprints([(other, asking(0.5)), (one, asking(0.5))])
    marks = [each.fingerprint(parse("mul(W, X)", "row")) for each in (both, again)]
    assert len({*marks, mark("mul(W, X)", on=one), mark("mul(W, X)", on=other)}) == 4


def test_fingerprint_tells_a_sum_from_a_mean_where_layers_compete():
    """Parts of layers have one size, so that on them both make the same mask."""
    one, other = "mul(W, rowmean(W))", "mul(W, rowsum(W))"
    for group, differ in (("model", True), ("layer", False)):
        target = Target(0.5, group_of(group))
        assert (mark(one, target) != mark(other, target)) == differ


@pytest.mark.parametrize(
    ("text", "problem"),
    [("tanh(exp(exp(exp(W))))", "constant"), ("exp(exp(exp(exp(exp(W)))))", "not finite")],
)
def test_fingerprint_refuses_scores_that_are_constant_or_not_finite(text, problem):
    assert refused(mark, text) == f"layer a: the scores of '{text}' are {problem}"


def test_fingerprint_refuses_a_metric_in_which_x_drowns_the_weights_in_any_task():
    drowned = probe(x_scale=1e5)
    problem = "'add(W, X)' prunes the same inputs in every row"
    assert refused(mark, "add(W, X)", HALF, drowned) == problem
    marks = Fingerprints([(probe(), asking(0.5)), (drowned, asking(0.5))])
    assert refused(marks.fingerprint, parse("add(W, X)", "row")) == problem
    assert mark("add(W, X)")


def test_tensors_digest_sees_every_name_and_value_and_no_order_or_layout():
    W, X = torch.arange(6.0).reshape(2, 3), torch.zeros(1, 3, dtype=torch.bfloat16)
    digest = tensors_digest({"W/a": W, "X/a": X})
    assert digest == tensors_digest({"X/a": X, "W/a": W.T.contiguous().T})
    changed = ({"W/a": W * 1.0001, "X/a": X}, {"W/b": W, "X/a": X}, {"W/a": W})
    assert len({digest, *map(tensors_digest, changed)}) == 4


@pytest.mark.parametrize(
    ("rows", "taken"), [(40, [0, 2, 5, 7, 10]), (32, [0, 2, 4, 6, 8]), (5, [0, 1, 2, 3, 4])]
)
def test_take_probe_takes_the_same_evenly_spaced_rows_of_w_and_g(rows, taken):
    W = torch.arange(float(rows))[:, None].expand(rows, 4)
    statistics = {"X/layers.0.up": torch.ones(1, 4), "G/layers.0.up": 2 * W}
    tensors = take_probe({"layers.0.up": W.bfloat16()}, statistics, ["layers.0"])
    W = tensors["W/layers.0.up"]
    assert W.shape == (min(rows, 16), 4)
    assert W[:5, 0].tolist() == taken
    assert torch.equal(tensors["G/layers.0.up"], 2 * W)
    assert tensors["X/layers.0.up"].shape == (1, 4)
    assert W.dtype == torch.float32


@pytest.mark.parametrize(
    ("targets", "taken"),
    [
        ((HALF,), [0, 2, 4, 6, 8]),
        ((HALF, TWO_OF_FOUR), [0, 1, 2, 3, 8, 9]),
        ((Target(0.5, NOfM(4, 8)), TWO_OF_FOUR), [0, 1, 2, 3, 4, 5, 6, 7, 16]),
    ],
)
def test_take_probe_takes_evenly_spaced_inputs_and_whole_groups_of_a_pattern(targets, taken):
    weights = {"layers.0.up": torch.arange(64.0).expand(3, 64)}
    statistics = {"X/layers.0.up": torch.arange(64.0)[None]}
    tensors = take_probe(weights, statistics, ["layers.0"], targets)
    assert tensors["W/layers.0.up"].shape == (3, 32)
    assert tensors["W/layers.0.up"][0, : len(taken)].tolist() == taken
    assert torch.equal(tensors["X/layers.0.up"], tensors["W/layers.0.up"][:1])


@pytest.mark.parametrize("group", [*map(group_of, WEIGHTS), NOfM(2, 4)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_mark_of_a_probe_is_the_mask_of_its_layers(group, sparsity):
    scores = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    layers = {str(place): layer for place, layer in enumerate(scores)}
    masks = group.select(layers.__getitem__, dict.fromkeys(layers, sparsity))
    expected = torch.stack([mask for _, mask in masks])
    assert torch.equal(group.mark(scores, list(layers), sparsity), expected)
