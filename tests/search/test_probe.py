"""The probe takes a few rows; stacked layers are scored and masked as each would be alone."""

import pytest
import torch
from refusals import refusal

from pruning.leaves import Statistics
from pruning.masks import GROUPS, DegenerateScores, NOfM, Row, Target, group_of, select
from pruning.metric import Metric
from search.fingerprint import Probe, check_rows_differ, probe_masks, stack_layers, take_probe

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
    probe = take_probe(weights, statistics, {f"layers.{i}": None for i in range(blocks)})
    expected = [f"layers.{i}.{part}" for i in taken for part in ("attn.q", "mlp.up")]
    assert list(probe.weights) == expected


@pytest.mark.parametrize(("rows", "step", "count"), [(40, 2, 16), (16, 1, 16), (5, 1, 5)])
def test_take_probe_takes_the_same_evenly_spaced_rows_of_w_and_g(rows, step, count):
    weights, statistics = model_tensors(blocks=1, rows=rows)
    taken = take_probe(weights, statistics, {"layers.0": None})
    expected = torch.arange(0.0, step * count, step)
    assert torch.equal(taken.weights["layers.0.mlp.up"][:, 0], expected)
    assert torch.equal(taken.statistics["G"]["layers.0.mlp.up"][:, 0], 2 * expected)
    assert taken.statistics["X"]["layers.0.mlp.up"].shape == (1, 4)
    assert taken.weights["layers.0.mlp.up"].dtype == torch.float32


@pytest.mark.parametrize("group", [*map(group_of, GROUPS), NOfM(2, 4)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.73])
def test_masks_of_stacked_layers_are_those_of_the_layers(group, sparsity):
    generator = torch.Generator().manual_seed(1)
    stacks = [torch.randn(3, 5, 16, generator=generator), torch.randn(2, 5, 8, generator=generator)]
    target = Target(sparsity, group)
    layers = {f"{i}.{j}": layer for i, stack in enumerate(stacks) for j, layer in enumerate(stack)}
    expected = dict(select(layers.__getitem__, layers, target))
    masks = probe_masks(stacks, target)
    for i, stack in enumerate(masks):
        for j, mask in enumerate(stack):
            assert torch.equal(mask, expected[f"{i}.{j}"])


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
    stacks = stack_layers(one)
    assert [stack.layers for stack in stacks] == [["a", "c"], ["b"]]
    for stack in stacks:
        for layer, scores in zip(stack.layers, stack.score(metric), strict=True):
            alone = metric.score(W=one.weights[layer].abs(), **one.statistics.of(layer))
            assert torch.allclose(scores, alone, rtol=1e-5)


def test_stacked_layers_of_some_inputs_have_whole_blocks_of_the_same_share_of_each():
    weights = {"a": torch.arange(64.0).expand(2, 64), "b": torch.arange(128.0).expand(2, 128)}
    X = {name: weight[:1] for name, weight in weights.items()}
    narrow, wide = stack_layers(Probe(weights, Statistics(X=X)), step=4, block=8)
    taken = [start + place for start in (0, 32, 64, 96) for place in range(8)]
    assert narrow.leaves["W"][0, 0].tolist() == taken[:16]
    assert wide.leaves["X"][0, 0].tolist() == taken
