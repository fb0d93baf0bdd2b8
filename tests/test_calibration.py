"""X and G against their definitions, computed without the streaming code."""

import pytest
import torch
from torch.nn import functional
from toy_models import FAMILIES, VOCABULARY, toy_model, toy_windows

from pruning.calibration import activation_sums, collect, gradient_sums
from pruning.models import linear_layers

BOTH = frozenset({"X", "G"})


def own_gradients(model, layers, windows):
    """Return each layer's weight gradients, one for each window, by autograd.grad."""
    weights = [layer.weight for layer in layers.values()]
    by_window = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        by_window.append(torch.autograd.grad(loss, weights))
    return dict(zip(layers, zip(*by_window, strict=True), strict=True))


@torch.no_grad()
def own_inputs(model, layers, windows):
    """Return each layer's inputs, one (tokens, in_features) for each window."""
    kept = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: kept[name].append(inputs[0].clone())
        )
        for name, layer in layers.items()
    ]
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: [x.reshape(-1, x.shape[-1]) for x in inputs] for name, inputs in kept.items()}


def relative_error(actual, expected):
    return (torch.norm(actual - expected) / torch.norm(expected)).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_statistic_is_the_mean_over_windows_of_squared_norms(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    X = collect(model, layers, windows, frozenset({"X"})).X
    assert list(X) == list(layers)
    for name, inputs in own_inputs(model, layers, windows).items():
        norms = torch.stack([torch.linalg.vector_norm(x, dim=0) for x in inputs])  # (N, in)
        torch.testing.assert_close(X[name], (norms**2).mean(0, keepdim=True))
        assert X[name].shape == (1, layers[name].in_features)


def test_activation_statistic_of_the_first_layer_follows_from_the_embeddings():
    model, windows = toy_model("llama"), toy_windows()
    with torch.no_grad():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(windows))
    name = "model.layers.0.self_attn.q_proj"
    X = collect(model, {name: model.get_submodule(name)}, windows, frozenset({"X"})).X
    torch.testing.assert_close(X[name], inputs.square().sum(1).mean(0, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_statistic_is_the_root_of_summed_squares_of_a_hundredfold_gradient(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    G = collect(model, layers, windows, frozenset({"G"})).G
    assert list(G) == list(layers)
    for name, gradients in own_gradients(model, layers, windows).items():
        expected = sum((100 * gradient) ** 2 for gradient in gradients).sqrt()
        torch.testing.assert_close(G[name], expected, rtol=1e-4, atol=1e-4)
        assert G[name].shape == layers[name].weight.shape
        assert G[name].count_nonzero() > 0


def test_a_window_given_twice_leaves_X_and_multiplies_G_by_the_root_of_two():
    model, window = toy_model("llama"), toy_windows(count=1)
    layers = linear_layers(model)
    once = collect(model, layers, window, BOTH)
    twice = collect(model, layers, window.repeat(2, 1), BOTH)
    for name in layers:
        torch.testing.assert_close(twice.X[name], once.X[name])
        torch.testing.assert_close(twice.G[name], once.G[name] * 2**0.5)


@pytest.mark.parametrize("leaves", ["", "W", "X", "G", "WX", "WG", "WXG"])
def test_only_what_is_named_is_collected(leaves):
    model = toy_model("llama")
    layers = linear_layers(model)
    statistics = collect(model, layers, toy_windows(), frozenset(leaves))
    assert set(statistics.X) == (set(layers) if "X" in leaves else set())
    assert set(statistics.G) == (set(layers) if "G" in leaves else set())


def test_statistics_collected_together_are_those_collected_alone():
    model, windows = toy_model("llama"), toy_windows()
    layers = linear_layers(model)
    both = collect(model, layers, windows, BOTH)
    X = collect(model, layers, windows, frozenset({"X"})).X
    G = collect(model, layers, windows, frozenset({"G"})).G
    for name in layers:
        torch.testing.assert_close(both.X[name], X[name])
        torch.testing.assert_close(both.G[name], G[name])


def test_X_alone_makes_no_logits():
    model = toy_model("llama")
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append(True))
    collect(model, linear_layers(model), toy_windows(), frozenset({"X"}))
    assert not called


def test_only_the_layers_given_are_watched():
    model = toy_model("llama")
    name = "model.layers.1.mlp.up_proj"
    statistics = collect(model, {name: model.get_submodule(name)}, toy_windows(), BOTH)
    assert list(statistics.X) == list(statistics.G) == [name]


def test_collect_leaves_the_model_as_it_was():
    model = toy_model("llama")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = linear_layers(model)
    collect(model, layers, toy_windows(), BOTH)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert not any(layer.weight._post_accumulate_grad_hooks for layer in layers.values())


def test_flags_and_hooks_are_restored_after_a_failure():
    model = toy_model("llama")
    layers = linear_layers(model)
    beyond = torch.tensor([[0, VOCABULARY]])
    with pytest.raises(IndexError):
        collect(model, layers, beyond, BOTH)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_collect_works_whether_or_not_gradients_are_enabled_outside():
    model, windows = toy_model("llama"), toy_windows()
    layers = linear_layers(model)
    expected = collect(model, layers, windows, BOTH)
    with torch.no_grad():
        actual = collect(model, layers, windows, BOTH)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(actual.G[name], expected.G[name]) for name in layers)
    assert not any(total.requires_grad for total in actual.G.values())


def test_statistics_of_a_bf16_model_are_fp32_and_close_to_those_of_fp32():
    model, windows = toy_model("llama"), toy_windows()
    exact = collect(model, linear_layers(model), windows, BOTH)
    model.to(torch.bfloat16)
    rough = collect(model, linear_layers(model), windows, BOTH)
    for name in exact.X:
        assert rough.X[name].dtype == rough.G[name].dtype == torch.float32
        assert relative_error(rough.X[name], exact.X[name]) < 0.03
        assert relative_error(rough.G[name], exact.G[name]) < 0.06


def test_sums_are_kept_in_fp32_where_bf16_would_stall():
    # In bf16 256 + 1 is 256, so a running sum of ones would stop there.
    layer = torch.nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    with activation_sums({"a": layer}) as X:
        for _ in range(300):
            layer(torch.ones(1, 2, dtype=torch.bfloat16))
        layer(torch.ones(301, 2, dtype=torch.bfloat16))  # nor is 301 a bf16 number
    assert X["a"].tolist() == [[601.0, 601.0]]


def test_gradients_are_freed_as_soon_as_they_are_added():
    model, window = toy_model("llama"), toy_windows(count=1)
    layers = linear_layers(model)
    with gradient_sums(model, layers):
        model(input_ids=window, labels=window).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_on_window_counts_the_windows():
    seen = []
    model = toy_model("llama")
    collect(model, linear_layers(model), toy_windows(count=3), BOTH, seen.append)
    assert seen == [1, 2, 3]
