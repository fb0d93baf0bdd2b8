"""The probe takes a few rows; stacked layers are scored and masked as each would be alone."""

import pytest
import torch
from refusals import refusal

from prunevolve.pruning.masks import GROUPS, DegenerateScores, NOfM, Row, Target, group_of
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.statistics import Statistics
from prunevolve.search.fingerprint import (
    Probe,
    check_rows_differ,
    probe_mask,
    stack_layers,
    take_probe,
)

HALF = Target(0.5, Row())


def model_tensors(blocks: int, rows: int) -> tuple[dict[str, torch.Tensor], Statistics]:
    names = [f"layers.{i}.{part}" for i in range(blocks) for part in ("mlp.up", "attn.q")]
    count = torch.arange(float(rows))[:, None]
    weights = {name: (count + i / 10).expand(rows, 4).bfloat16() for i, name in enumerate(names)}
    X = {name: torch.ones(1, 4) for name in names}
    G = {name: count.expand(rows, 4) * 2 for name in names}
    return weights, Statistics(X=X, G=G)


@pytest.mark.parametrize(("blocks", "taken"), [(12, (0, 11, 6)), (1, (0,))])
def test_take_probe_takes_an_early_a_middle_and_a_late_block(blocks, taken):
    weights, statistics = model_tensors(blocks, rows=4)
    probe = take_probe(weights, statistics, [f"layers.{i}" for i in range(blocks)])
    expected = [f"layers.{i}.{part}" for i in taken for part in ("attn.q", "mlp.up")]
    assert list(probe.weights) == expected


@pytest.mark.parametrize(
    ("rows", "taken"), [(40, [0, 2, 5, 7, 10]), (32, [0, 2, 4, 6, 8]), (5, [0, 1, 2, 3, 4])]
)
def test_take_probe_takes_the_same_evenly_spaced_rows_of_w_and_g(rows, taken):
    weights, statistics = model_tensors(blocks=1, rows=rows)
    probe = take_probe(weights, statistics, ["layers.0"])
    W, G = probe.weights["layers.0.mlp.up"], probe.statistics["G"]["layers.0.mlp.up"]
    assert W.shape == (min(rows, 16), 4)
    assert W[:5, 0].tolist() == taken
    assert torch.equal(G, 2 * W)
    assert probe.statistics["X"]["layers.0.mlp.up"].shape == (1, 4)
    assert W.dtype == torch.float32


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
    X = {"layers.0.up": torch.arange(64.0)[None]}
    probe = take_probe(weights, Statistics(X=X), ["layers.0"], targets)
    assert probe.weights["layers.0.up"].shape == (3, 32)
    assert probe.weights["layers.0.up"][0, : len(taken)].tolist() == taken
    assert torch.equal(probe.statistics["X"]["layers.0.up"], probe.weights["layers.0.up"][:1])


@pytest.mark.parametrize("group", [*map(group_of, GROUPS), NOfM(2, 4)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_probe_mask_of_stacked_layers_is_that_of_the_layers(group, sparsity):
    generator = torch.Generator().manual_seed(1)
    stacks = [torch.randn(3, 5, 16, generator=generator), torch.randn(2, 5, 8, generator=generator)]
    target = Target(sparsity, group)
    names = [[f"{i}.{j}" for j in range(len(stack))] for i, stack in enumerate(stacks)]
    layers = {
        n: layer for i, stack in enumerate(stacks) for n, layer in zip(names[i], stack, strict=True)
    }
    masks = group.select(layers.__getitem__, dict.fromkeys(layers, sparsity))
    expected = [mask.flatten() for _, mask in masks]
    assert torch.equal(probe_mask(stacks, target), torch.cat(expected))


def test_rows_of_one_mask_are_refused_unless_another_layer_or_nothing_is_removed():
    same, other = torch.tensor([[[True, False], [True, False]]]), torch.eye(2).bool()[None]
    message = refusal(check_rows_differ, [same, same], HALF, "X", error=DegenerateScores)
    assert message == "'X' prunes the same inputs in every row"
    check_rows_differ([same, other], HALF, "X")
    check_rows_differ([torch.cat([same, other])], HALF, "X")
    check_rows_differ([same], Target(0.0, Row()), "X")


def test_stacked_layers_score_as_each_does_alone():
    generator = torch.Generator().manual_seed(2)
    widths = {"a": 12, "b": 8, "c": 12}

    def draw(rows: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(rows, width, generator=generator) for name, width in widths.items()
        }

    one = Probe(draw(5), Statistics(X=draw(1), M=draw(5)))
    metric = Metric.parse("div(mul(zsn(W), exp(colmean(quot(M, rowsum(W))))), sqrt(X))")
    other = Probe({"a": draw(5)["a"]}, Statistics(X={"a": draw(1)["a"]}, M={"a": draw(5)["a"]}))
    stacks = stack_layers([one, other])
    assert [stack.layers for stack in stacks] == [["a", "c", "a"], ["b"]]
    places = [{0: slice(0, 2), 1: slice(2, 3)}, {0: slice(0, 1)}]
    assert [stack.of_probe for stack in stacks] == places
    for stack in stacks:
        for place, scores in enumerate(stack.score(metric)):
            probe = one if place < stack.of_probe[0].stop else other
            layer = stack.layers[place]
            alone = metric.score(W=probe.weights[layer].abs(), **probe.statistics.of(layer))
            assert torch.allclose(scores, alone, rtol=1e-5)
