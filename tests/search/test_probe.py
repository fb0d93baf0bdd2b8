"""The probe takes a few rows; its layers are scored and masked at once as each would be alone."""

import pytest
import torch

from prunevolve.pruning.masks import GROUPS, NOfM, Row, Target, group_of
from prunevolve.pruning.metric import Metric
from prunevolve.search.fingerprint import Probe, probe_mask, take_probe

HALF = Target(0.5, Row())


def model_tensors(blocks, rows):
    names = [f"layers.{i}.{part}" for i in range(blocks) for part in ("mlp.up", "attn.q")]
    count = torch.arange(float(rows))[:, None]
    weights = {name: (count + i / 10).expand(rows, 4).bfloat16() for i, name in enumerate(names)}
    X = {f"X/{name}": torch.ones(1, 4) for name in names}
    return weights, X | {f"G/{name}": count.expand(rows, 4) * 2 for name in names}


@pytest.mark.parametrize(("blocks", "taken"), [(12, (0, 11, 6)), (1, (0,))])
def test_take_probe_takes_an_early_a_middle_and_a_late_block(blocks, taken):
    weights, statistics = model_tensors(blocks, rows=4)
    tensors = take_probe(weights, statistics, [f"layers.{i}" for i in range(blocks)])
    expected = [f"layers.{i}.{part}" for i in taken for part in ("attn.q", "mlp.up")]
    assert list(Probe.from_tensors(tensors).layers) == expected


@pytest.mark.parametrize(
    ("rows", "taken"), [(40, [0, 2, 5, 7, 10]), (32, [0, 2, 4, 6, 8]), (5, [0, 1, 2, 3, 4])]
)
def test_take_probe_takes_the_same_evenly_spaced_rows_of_w_and_g(rows, taken):
    tensors = take_probe(*model_tensors(blocks=1, rows=rows), ["layers.0"])
    W = tensors["W/layers.0.mlp.up"]
    assert W.shape == (min(rows, 16), 4)
    assert W[:5, 0].tolist() == taken
    assert torch.equal(tensors["G/layers.0.mlp.up"], 2 * W)
    assert tensors["X/layers.0.mlp.up"].shape == (1, 4)
    assert W.dtype == torch.float32


def test_take_probe_takes_as_much_of_every_layer_as_the_smallest_has():
    weights = {"layers.0.up": torch.ones(20, 64), "layers.0.down": torch.ones(64, 20)}
    statistics = {f"X/{name}": torch.ones(1, w.shape[1]) for name, w in weights.items()}
    probe = Probe.from_tensors(take_probe(weights, statistics, ["layers.0"]))
    assert probe.terminals["W"].shape == (2, 16, 20)
    assert probe.terminals["X"].shape == (2, 1, 20)


@pytest.mark.parametrize(
    ("targets", "taken"),
    [
        ((HALF,), [0, 2, 4, 6, 8]),
        ((HALF, Target(0.5, NOfM(2, 4))), [0, 1, 2, 3, 8, 9]),
        ((Target(0.5, NOfM(4, 8)), Target(0.5, NOfM(2, 4))), [0, 1, 2, 3, 4, 5, 6, 7, 16]),
    ],
)
def test_take_probe_takes_evenly_spaced_inputs_and_whole_groups_of_a_pattern(targets, taken):
    weights = {"layers.0.up": torch.arange(64.0).expand(3, 64)}
    statistics = {"X/layers.0.up": torch.arange(64.0)[None]}
    tensors = take_probe(weights, statistics, ["layers.0"], targets)
    assert tensors["W/layers.0.up"].shape == (3, 32)
    assert tensors["W/layers.0.up"][0, : len(taken)].tolist() == taken
    assert torch.equal(tensors["X/layers.0.up"], tensors["W/layers.0.up"][:1])


@pytest.mark.parametrize("group", [*map(group_of, GROUPS), NOfM(2, 4)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_probe_mask_is_that_of_the_layers(group, sparsity):
    scores = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    layers = {str(place): layer for place, layer in enumerate(scores)}
    masks = group.select(layers.__getitem__, dict.fromkeys(layers, sparsity))
    expected = torch.stack([mask for _, mask in masks])
    assert torch.equal(probe_mask(scores, Target(sparsity, group)), expected)


def test_layers_of_a_probe_score_as_each_does_alone():
    generator = torch.Generator().manual_seed(2)
    shapes = {"W": (5, 12), "X": (1, 12), "M": (5, 12)}
    tensors = {
        f"{terminal}/{layer}": torch.randn(*shape, generator=generator)
        for terminal, shape in shapes.items()
        for layer in "abc"
    }
    metric = Metric.parse("div(mul(zsn(W), exp(colmean(quot(M, rowsum(W))))), sqrt(X))")
    for layer, scores in zip("abc", Probe.from_tensors(tensors).score(metric), strict=True):
        terminals = {terminal: tensors[f"{terminal}/{layer}"] for terminal in shapes}
        alone = metric.score(**terminals | {"W": terminals["W"].abs()})
        assert torch.allclose(scores, alone, rtol=1e-5)
