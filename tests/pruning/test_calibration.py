"""Each statistic against its definition, computed without the streaming code."""

import pytest
import torch
from torch.nn import functional
from toy_models import FAMILIES, VOCABULARY, toy_model, toy_windows

from pruning.calibration import statistics_of, watched_gradients, watched_inputs
from pruning.leaves import LEAVES, STATISTICS, Seen, Statistics
from pruning.models import decoder_blocks, layers_of_block, linear_layers
from pruning.store import ResidentStore
from pruning.walk import collect

BOTH = frozenset({"X", "G"})
ALL = frozenset(STATISTICS)


def own_gradients(model, layers, windows):
    """Return each layer's weight gradients, one for each window, by autograd.grad."""
    weights = [layer.weight for layer in layers.values()]
    by_window = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        by_window.append(torch.autograd.grad(loss, weights))
    return dict(zip(layers, zip(*by_window, strict=True), strict=True))


def own_output_gradients(model, layers, windows):
    """Return each layer's output gradients over all windows' tokens, by autograd.grad."""
    kept = {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: kept.update({name: y}))
        for name, layer in layers.items()
    ]
    by_window = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        by_window.append(torch.autograd.grad(loss, [kept[name] for name in layers]))
    for handle in handles:
        handle.remove()
    stacked = [torch.cat(gradients).flatten(0, -2) for gradients in zip(*by_window, strict=True)]
    return dict(zip(layers, stacked, strict=True))


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
    X = collect(ResidentStore(model), windows, frozenset({"X"}))["X"]
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
    X = collect(ResidentStore(model), windows, frozenset({"X"}))["X"]
    torch.testing.assert_close(X[name], inputs.square().sum(1).mean(0, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_statistic_is_the_root_of_summed_squares_of_a_hundredfold_gradient(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    G = collect(ResidentStore(model), windows, frozenset({"G"}))["G"]
    assert list(G) == list(layers)
    for name, gradients in own_gradients(model, layers, windows).items():
        expected = sum((100 * gradient) ** 2 for gradient in gradients).sqrt()
        torch.testing.assert_close(G[name], expected, rtol=1e-4, atol=1e-4)
        assert G[name].shape == layers[name].weight.shape
        assert G[name].count_nonzero() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_inverse_gram_diagonal_is_of_all_tokens_and_damped_by_a_hundredth(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    found = collect(ResidentStore(model), windows, frozenset({"H", "X"}))
    assert list(found["H"]) == list(layers)
    for name, inputs in own_inputs(model, layers, windows).items():
        tokens = torch.cat(inputs).double()
        gram = tokens.T @ tokens / len(windows)
        torch.testing.assert_close(gram.diagonal()[None].float(), found["X"][name])
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        expected = torch.linalg.inv(damped).diagonal()[None]
        torch.testing.assert_close(found["H"][name], expected.float(), rtol=1e-3, atol=0)


def gram_leaf(inputs):
    """Return the leaf H of a layer that sees these inputs, (tokens, in), as one window."""
    total = LEAVES["H"].start(torch.nn.Linear(inputs.shape[1], 2))
    total.add(inputs, slice(None))
    return total.result(Seen(1, len(inputs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_ratio_counts_what_is_above_five_times_the_mean(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    for layer in layers.values():
        layer.weight.data[0, :3] *= 40  # else no toy has an outlier
    found = collect(ResidentStore(model), windows, frozenset({"O"}))["O"]
    for name, inputs in own_inputs(model, layers, windows).items():
        scores = layers[name].weight.abs() * torch.cat(inputs).norm(dim=0)
        outliers = (scores > 5 * scores.mean()).sum() / scores.numel()
        assert found[name].tolist() == [[pytest.approx(outliers.item())]]
        assert 0 < outliers < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_influence_are_those_of_the_block(family):
    model, windows = toy_model(family), toy_windows()
    with torch.no_grad():
        states = model(input_ids=windows, output_hidden_states=True).hidden_states
    found = collect(ResidentStore(model), windows, frozenset({"D", "I"}))
    blocks = decoder_blocks(model)
    for i, (block, module) in enumerate(blocks.items()):
        influences = set()
        for name in layers_of_block(block, module):
            assert found["D"][name].tolist() == [[i / (len(blocks) - 1)]]
            influences.add(found["I"][name].item())
        assert len(influences) == 1
        if i < len(blocks) - 1:  # the last state that is put out is after the final norm
            cosines = functional.cosine_similarity(states[i], states[i + 1], dim=-1)
            assert influences.pop() == pytest.approx(1 - cosines.mean().item(), abs=1e-5)


def test_inverse_gram_diagonal_by_hand():
    # The Gram matrix is [[2, 1], [1, 1]], damped by 0.015: its inverse has the other diagonal
    # entry over the determinant, 2.015 * 1.015 - 1.
    found = gram_leaf(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    expected = torch.tensor([[1.015, 2.015]]) / (2.015 * 1.015 - 1)
    torch.testing.assert_close(found, expected)


def test_inverse_gram_diagonal_is_finite_where_no_input_was_other_than_zero():
    assert torch.isfinite(gram_leaf(torch.zeros(3, 4))).all()
    one_dead = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    one_dead[:, 2] = 0
    found = gram_leaf(one_dead)
    assert torch.isfinite(found).all()
    assert found.argmax() == 2


def test_inverse_gram_diagonal_is_damped_more_where_fp32_needs_it():
    # Two channels that are one: without enough damping there is no factor in fp32.
    channel = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    found = gram_leaf(torch.cat([channel * 1e6, channel * 1e6, channel], 1))
    assert torch.isfinite(found).all() and (found > 0).all()


def test_inverse_gram_diagonal_of_inputs_that_are_not_finite_ends():
    assert not torch.isfinite(gram_leaf(torch.full((3, 2), float("inf")))).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_and_variance_are_of_the_inputs_over_all_tokens(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    found = collect(ResidentStore(model), windows, frozenset({"A", "V"}))
    assert list(found["A"]) == list(found["V"]) == list(layers)
    for name, inputs in own_inputs(model, layers, windows).items():
        tokens = torch.cat(inputs).double()  # (all tokens, in)
        variance = tokens.square().mean(0, keepdim=True) - tokens.mean(0, keepdim=True).square()
        # In fp32, as the statistics are: torch asks more digits of fp64 than they have.
        torch.testing.assert_close(found["A"][name], tokens.abs().mean(0, keepdim=True).float())
        torch.testing.assert_close(found["V"][name], variance.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("leaves", ["B", "BG", "BX"])
def test_output_gradient_statistic_is_the_root_mean_square_over_all_tokens(family, leaves):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    B = collect(ResidentStore(model), windows, frozenset(leaves))["B"]
    assert list(B) == list(layers)
    for name, gradients in own_output_gradients(model, layers, windows).items():
        expected = (100 * gradients).square().mean(0).sqrt()[:, None]
        torch.testing.assert_close(B[name], expected, rtol=1e-4, atol=1e-5)
        assert B[name].shape == (layers[name].out_features, 1)
        assert B[name].count_nonzero() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_movement_statistic_is_the_summed_fall_of_the_loss_away_from_zero(family):
    model, windows = toy_model(family), toy_windows()
    layers = linear_layers(model)
    M = collect(ResidentStore(model), windows, frozenset({"M"}))["M"]
    assert list(M) == list(layers)
    for name, gradients in own_gradients(model, layers, windows).items():
        expected = -100 * sum(gradients) * layers[name].weight.detach().sign()
        torch.testing.assert_close(M[name], expected, rtol=1e-4, atol=1e-4)
        assert (M[name] > 0).any() and (M[name] < 0).any()


def test_weight_times_movement_foretells_what_the_loss_loses_to_a_smaller_weight():
    model, windows = toy_model("llama"), toy_windows()
    name, layer = next(iter(linear_layers(model).items()))
    M = collect(ResidentStore(model), windows, frozenset({"M"}))["M"][name]

    def loss():
        with torch.no_grad():
            return sum(model(input_ids=w[None], labels=w[None]).loss.item() for w in windows)

    foretold = (layer.weight.detach().abs() * M).sum().item() / 100
    before, shrink = loss(), 1e-3
    with torch.no_grad():
        layer.weight.mul_(1 - shrink)
    assert (loss() - before) / shrink == pytest.approx(foretold, rel=0.05)


def test_variance_holds_where_a_channel_is_far_from_zero():
    # In fp32 the mean square of 4096 and its neighbours is coarser than their variance.
    layer = torch.nn.Linear(1, 1, bias=False)
    with watched_inputs({"a": layer}, frozenset({"V"}), layer) as sums:
        for values in ([4095.0, 4097.0], [4096.0], [4096.0, 4094.0, 4098.0]):
            layer(torch.tensor(values)[:, None])
    # Deviations from 4096: -1, 1, 0, 0, -2, 2; squared 10 in all, over 6.
    found = statistics_of(sums, torch.zeros(3, 2))
    assert found["V"]["a"].item() == pytest.approx(10 / 6)


def test_statistics_come_back_from_their_tensors():
    model = toy_model("llama")
    found = collect(ResidentStore(model), toy_windows(), ALL)
    tensors = found.to_tensors()
    again = Statistics.from_tensors(tensors)
    assert len(tensors) == len(STATISTICS) * len(linear_layers(model))
    for name in STATISTICS:
        assert list(again.leaf(name)) == list(found.leaf(name))
    assert all(torch.equal(again.to_tensors()[key], tensors[key]) for key in tensors)


def test_statistics_of_a_layer_are_those_that_are_there():
    X, B = torch.ones(1, 2), torch.ones(3, 1)
    statistics = Statistics(X={"a": X, "b": X}, B={"a": B})
    assert statistics.of("a") == {"X": X, "B": B}
    assert statistics.of("b") == {"X": X}
    assert statistics.of("c") == {}


def test_window_given_twice_leaves_means_doubles_M_and_multiplies_G_by_the_root_of_two():
    model, window = toy_model("llama"), toy_windows(count=1)
    layers = linear_layers(model)
    once = collect(ResidentStore(model), window, ALL)
    twice = collect(ResidentStore(model), window.repeat(2, 1), ALL)
    for name in layers:
        for leaf in STATISTICS - {"G", "M"}:
            torch.testing.assert_close(twice.leaf(leaf)[name], once.leaf(leaf)[name])
        torch.testing.assert_close(twice["M"][name], once["M"][name] * 2)
        torch.testing.assert_close(twice["G"][name], once["G"][name] * 2**0.5)


@pytest.mark.parametrize("leaves", ["", "W", *"XGAVBHOM", "WX", "AG", "VB", "GM", "WXGAVBHOM"])
def test_only_what_is_named_is_collected(leaves):
    model = toy_model("llama")
    layers = linear_layers(model)
    statistics = collect(ResidentStore(model), toy_windows(), frozenset(leaves))
    for leaf in STATISTICS:
        assert set(statistics.leaf(leaf)) == (set(layers) if leaf in leaves else set())


def test_statistics_collected_together_are_those_collected_alone():
    model, windows = toy_model("llama"), toy_windows()
    layers = linear_layers(model)
    together = collect(ResidentStore(model), windows, ALL)
    for leaf in STATISTICS:
        alone = collect(ResidentStore(model), windows, frozenset({leaf})).leaf(leaf)
        for name in layers:
            torch.testing.assert_close(together.leaf(leaf)[name], alone[name])


def test_activations_alone_make_no_logits():
    model = toy_model("llama")
    called = []
    model.lm_head.register_forward_hook(lambda *_: called.append(True))
    collect(ResidentStore(model), toy_windows(), frozenset({"X", "A", "V"}))
    assert not called


def test_only_the_layers_given_are_watched():
    model, windows = toy_model("llama"), toy_windows()
    name = "model.layers.1.mlp.up_proj"
    layers = {name: model.get_submodule(name)}
    block = model.get_submodule("model.layers.1")
    with (
        watched_inputs(layers, ALL, block) as of_inputs,
        watched_gradients(layers, ALL) as of_gradients,
    ):
        model(input_ids=windows, labels=windows).loss.backward()
    found = [statistics_of(sums, windows) for sums in (of_inputs, of_gradients)]
    assert [set(part) for part in found] == [{"X", "A", "V", "H", "O", "D", "I"}, {"G", "B", "M"}]
    assert all(list(by_layer) == [name] for part in found for by_layer in part.values())


def test_collect_leaves_the_model_as_it_was():
    model = toy_model("llama")
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = linear_layers(model)
    collect(ResidentStore(model), toy_windows(), ALL)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers.values())
    assert not any(layer.weight._post_accumulate_grad_hooks for layer in layers.values())


def test_flags_and_hooks_are_restored_after_a_failure():
    model = toy_model("llama")
    layers = linear_layers(model)
    beyond = torch.tensor([[0, VOCABULARY]])
    with pytest.raises(IndexError):
        collect(ResidentStore(model), beyond, ALL)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers.values())


def test_collect_works_whether_or_not_gradients_are_enabled_outside():
    model, windows = toy_model("llama"), toy_windows()
    layers = linear_layers(model)
    expected = collect(ResidentStore(model), windows, BOTH)
    with torch.no_grad():
        actual = collect(ResidentStore(model), windows, BOTH)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(actual["G"][name], expected["G"][name]) for name in layers)
    assert not any(total.requires_grad for total in actual["G"].values())


def test_statistics_of_a_bf16_model_are_fp32_and_close_to_those_of_fp32():
    model, windows = toy_model("llama"), toy_windows()
    exact = collect(ResidentStore(model), windows, ALL).to_tensors()
    model.to(torch.bfloat16)
    rough = collect(ResidentStore(model), windows, ALL).to_tensors()
    for key, statistic in rough.items():
        assert statistic.dtype == torch.float32
        if key[0] == "D":
            assert torch.equal(statistic, exact[key])
        elif key[0] == "O":  # a count: a weight or two at the limit are on its other side
            assert (statistic - exact[key]).abs() < 0.02
        else:
            assert relative_error(statistic, exact[key]) < (0.06 if key[0] in "GBM" else 0.03)


def test_sums_are_kept_in_fp32_where_bf16_would_stall():
    # In bf16 256 + 1 is 256, so a running sum of ones would stop there.
    layer = torch.nn.Linear(2, 3, bias=False).to(torch.bfloat16)
    with watched_inputs({"a": layer}, frozenset({"X"}), layer) as sums:
        for _ in range(300):
            layer(torch.ones(1, 2, dtype=torch.bfloat16))
        layer(torch.ones(301, 2, dtype=torch.bfloat16))  # nor is 301 a bf16 number
    assert statistics_of(sums, torch.zeros(1, 601))["X"]["a"].tolist() == [[601.0, 601.0]]


def test_gradients_are_freed_as_soon_as_they_are_added():
    model, window = toy_model("llama"), toy_windows(count=1)
    layers = linear_layers(model)
    model.requires_grad_(False)
    with watched_gradients(layers, frozenset({"G", "M"})):
        model(input_ids=window, labels=window).loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_blocks_forward_and_back():
    seen = []
    collect(ResidentStore(toy_model("llama")), toy_windows(), BOTH, lambda *at: seen.append(at))
    assert seen == [(stage, done, 2) for stage in ("forward", "backward") for done in (0, 1, 2)]
