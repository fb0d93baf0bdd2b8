"""Each statistic against its definition, computed without the streaming code."""

from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from toy_models import (
    FAMILIES,
    VOCABULARY,
    assert_same_tensors,
    own_gradients,
    own_inputs,
    toy_model,
    toy_windows,
)

from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.pruner import collect
from prunevolve.pruning.statistics import STATISTICS, TERMINALS, Seen, statistics_of, watched
from prunevolve.pruning.store import ResidentStore

ALL = frozenset(STATISTICS)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_inputs_are_their_definitions_over_all_tokens(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    found = collect(ResidentStore(model), windows, frozenset("XVH"))
    assert set(found) == {f"{terminal}/{name}" for terminal in "HVX" for name in layers}
    for name, inputs in own_inputs(model, layers, windows).items():
        tokens = torch.cat(inputs).double()  # (all tokens, in)
        gram = tokens.T @ tokens / len(windows)
        variance = tokens.square().mean(0) - tokens.mean(0).square()
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        inverse = torch.linalg.inv(damped).diagonal()
        # In fp32, as the statistics are: torch asks more digits of fp64 than they have.
        assert_close(found[f"X/{name}"], gram.diagonal()[None].float())
        assert_close(found[f"V/{name}"], variance[None].float(), rtol=1e-4, atol=1e-6)
        assert_close(found[f"H/{name}"], inverse[None].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_gradients_are_of_a_hundredfold_gradient_in_each_window(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    found = collect(ResidentStore(model), windows, frozenset("GMB"))
    assert set(found) == {f"{terminal}/{name}" for terminal in "BGM" for name in layers}
    for name, pairs in own_gradients(model, layers, windows).items():
        gradients = [gradient for gradient, _ in pairs]
        root = sum((100 * gradient) ** 2 for gradient in gradients).sqrt()
        assert_close(found[f"G/{name}"], root, rtol=1e-4, atol=1e-4)
        # How far the loss falls if the weight moves away from zero.
        fall = -100 * sum(gradients) * layers[name].weight.detach().sign()
        assert_close(found[f"M/{name}"], fall, rtol=1e-4, atol=1e-4)
        assert (fall > 0).any() and (fall < 0).any()
        # The root mean square over all tokens.
        of_outputs = 100 * torch.cat([gradient for _, gradient in pairs])
        expected = of_outputs.square().mean(0).sqrt()[:, None]
        assert_close(found[f"B/{name}"], expected, rtol=1e-4, atol=1e-5)
        assert expected.count_nonzero() > 0


def gram_terminal(inputs):
    """Return the terminal H of a layer that sees these inputs, (tokens, in), as one window."""
    layer = torch.nn.Linear(inputs.shape[1], 2)
    total = TERMINALS["H"].start(layer, inputs.device)
    TERMINALS["H"].add(total, inputs, layer.weight)
    return TERMINALS["H"].finish(total, Seen(1, len(inputs)))


def test_inverse_gram_diagonal_is_finite_where_inputs_are_also_if_they_are_zero():
    assert torch.isfinite(gram_terminal(torch.zeros(3, 4))).all()
    assert not torch.isfinite(gram_terminal(torch.full((3, 2), torch.inf))).any()  # and it ends
    one_dead = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    one_dead[:, 2] = 0
    found = gram_terminal(one_dead)
    assert torch.isfinite(found).all()
    assert found.argmax() == 2


def test_variance_holds_where_a_channel_is_far_from_zero():
    # In fp32 the mean square of 4096 and its neighbours is coarser than their variance.
    layer = torch.nn.Linear(1, 1, bias=False)
    with watched({"a": layer}, frozenset({"V"})) as sums:
        for values in ([4095.0, 4097.0], [4096.0], [4096.0, 4094.0, 4098.0]):
            layer(torch.tensor(values)[:, None])
    # Deviations from 4096: -1, 1, 0, 0, -2, 2; squared 10 in all, over 6.
    found = statistics_of(sums, torch.zeros(3, 2))
    assert found["V/a"].item() == pytest.approx(10 / 6)


@pytest.mark.parametrize("terminals", ["", "W", *"XGVBHM", "WX", "XG", "VB", "GM", "BG", "WXGVBHM"])
def test_what_is_named_is_collected_as_if_alone_also_where_gradients_are_off(terminals):
    model = toy_model("llama")
    together = collect(ResidentStore(model), toy_windows(), ALL)
    with torch.no_grad():
        found = collect(ResidentStore(model), toy_windows(), frozenset(terminals))
        assert not torch.is_grad_enabled()
    named = STATISTICS & set(terminals)
    assert set(found) == {f"{x}/{layer}" for x in named for layer in linear_layers(model)}
    for key, statistic in found.items():
        assert_close(statistic, together[key])
        assert not statistic.requires_grad


@pytest.mark.parametrize("windows", [toy_windows(), torch.tensor([[0, VOCABULARY]])])
def test_collect_leaves_the_model_as_it_was_after_a_failure_too(windows):
    model = toy_model("llama")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(IndexError) if windows.max() >= VOCABULARY else nullcontext():
        collect(ResidentStore(model), windows, ALL)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_tensors(model.state_dict(), before)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
    for layer in linear_layers(model).values():
        assert not layer.weight._post_accumulate_grad_hooks


def test_sums_are_kept_in_fp32_where_bf16_would_stall():
    # In bf16 256 + 1 is 256, so a running sum of ones would stop there.
    layer = torch.nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    with watched({"a": layer}, frozenset({"X"})) as sums:
        for _ in range(300):
            layer(torch.ones(1, 2, dtype=torch.bfloat16))
        layer(torch.ones(301, 2, dtype=torch.bfloat16))  # nor is 301 a bf16 number
    assert statistics_of(sums, torch.zeros(1, 601))["X/a"].tolist() == [[601.0, 601.0]]


def test_gradients_are_freed_as_soon_as_they_are_added():
    model, window = toy_model("llama"), toy_windows(count=1)
    layers = linear_layers(model)
    model.requires_grad_(False)
    with watched(layers, frozenset({"G", "M"})):
        model(input_ids=window, labels=window).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
