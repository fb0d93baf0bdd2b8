"""Reconstruction: a pruned block is trained to give the dense block's outputs."""

from dataclasses import replace

import pytest
import torch
from toy_models import assert_same_tensors, toy_model, toy_windows

from prunevolve import prune
from prunevolve.pruning.masks import Row
from prunevolve.pruning.reconstruct import RATE, Examples, reconstruct


class Block(torch.nn.Module):
    """Two layers in turn, with an activation between them."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.Linear(16, 24, bias=False)
        self.mlp = torch.nn.Linear(24, 16, bias=False)

    def forward(self, hidden):
        return hidden + self.mlp(torch.relu(self.attention(hidden)))


@pytest.fixture
def pruned():
    """A block, its weights with half of each row removed, and what it is trained on."""
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    weights = {}
    for name, layer in (("block.attention", block.attention), ("block.mlp", block.mlp)):
        mask = Row().mask(layer.weight.abs(), 0.5)
        weights[name] = layer.weight * ~mask
    windows = torch.randn(16, 1, 32, 16)
    examples = Examples(
        16, lambda i: windows[i] * 1.01, lambda i: block(windows[i]), lambda b, x: b(x)
    )
    return block, weights, examples


@torch.no_grad()
def error_of(weights, examples):
    copy = Block()
    copy.attention.weight.data, copy.mlp.weight.data = weights.values()
    gaps = [copy(examples.input(i)) - examples.target(i) for i in range(examples.windows)]
    return float(torch.stack(gaps).square().mean())


def test_error_falls_and_zeros_and_what_is_given_stay(pruned):
    block, weights, examples = pruned
    before = {name: weight.clone() for name, weight in weights.items()}
    dense = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    trained, errors = reconstruct("block", block, weights, examples)
    assert_same_tensors(weights, before)
    assert_same_tensors(block.state_dict(), dense)
    assert error_of(trained, examples) < 0.7 * error_of(weights, examples)
    for name, weight in weights.items():
        assert torch.equal(trained[name] == 0, weight == 0), name
    assert list(errors) == ["attention", "mlp"]
    for of_part in errors.values():
        assert min(of_part) < of_part[0]
    assert errors["mlp"][0] == pytest.approx(min(errors["attention"]))


def test_seed_decides_the_result(pruned):
    results = [reconstruct("block", *pruned, seed)[0] for seed in (0, 0, 1)]
    first, again, other = (result["block.mlp"] for result in results)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("rate", "sound"), [(100.0, 10**6), (RATE, 1), (RATE, 5)])
def test_weights_that_do_not_get_better_or_have_no_error_are_kept(pruned, monkeypatch, rate, sound):
    block, weights, examples = pruned
    monkeypatch.setattr("prunevolve.pruning.reconstruct.RATE", rate)
    runs = []

    def overflows(module, hidden):
        runs.append(hidden)
        return module(hidden) * (torch.nan if len(runs) > sound else 1)

    trained, errors = reconstruct("block", block, weights, replace(examples, run=overflows))
    assert_same_tensors(trained, weights)
    assert [len(of_part) for of_part in errors.values()] == [2, 2]


def test_block_with_one_window_is_not_trained(pruned):
    block, weights, examples = pruned
    trained, errors = reconstruct("block", block, weights, replace(examples, windows=1))
    assert_same_tensors(trained, weights)
    assert errors == {}


def test_pruned_model_comes_nearer_to_the_dense_one(unguarded):
    windows = toy_windows(count=24)

    def outputs(update):
        model = toy_model("llama")
        if update:
            prune(model, "mul(W, G)", windows, sparsity=0.6, update=update)
        with torch.no_grad():
            return model(windows, output_hidden_states=True).hidden_states[-1]

    dense, plain, trained = outputs(""), outputs("none"), outputs("reconstruct")
    assert (trained - dense).square().mean() < 0.8 * (plain - dense).square().mean()
