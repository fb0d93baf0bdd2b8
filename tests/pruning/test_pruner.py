"""The walk over blocks against masks and loops written out here, for every family."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional
from toy_models import FAMILIES, toy_model, toy_windows

from pruning.masks import Layer, Model, NOfM, Row, Target
from pruning.metric import Metric
from pruning.models import decoder_blocks, linear_layers
from pruning.pruner import prune
from pruning.recipe import Recipe
from pruning.store import ResidentStore
from pruning.walk import Texts, collect

WANDA = Metric.parse("mul(W, sqrt(X))")
GBLM = Metric.parse("mul(W, add(G, sqrt(X)))")
SNIP = Metric.parse("mul(W, G)")
MAGNITUDE = Metric.parse("W")
ROW = Target(0.5, Row())
TWO_OF_FOUR = Target(0.5, NOfM(2, 4))
UP_PROJ = "model.layers.1.mlp.up_proj"
NO_WINDOWS = torch.empty(0, 8, dtype=torch.int64)


# Independent statistics, masks and loops


@torch.no_grad()
def own_activations(model, names, windows):
    """Return the mean over windows of each named layer's squared input norms, (1, in)."""
    sums = dict.fromkeys(names, 0)

    def watch(name):
        def add(_, inputs):
            tokens = inputs[0].flatten(end_dim=-2)  # some families merge batch and tokens
            sums[name] = sums[name] + tokens.square().sum(0, keepdim=True)

        return add

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    for window in windows:
        model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: total / len(windows) for name, total in sums.items()}


def own_gradients(model, windows):
    """Return the root of the summed squares of the gradients times 100, (out, in)."""
    layers = linear_layers(model)
    weights = [layer.weight for layer in layers.values()]
    sums = [torch.zeros_like(weight) for weight in weights]
    for window in windows:
        logits = model(input_ids=window[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], window[1:])
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += (100 * gradient) ** 2
    return {name: total.sqrt() for name, total in zip(layers, sums, strict=True)}


def keep_highest(weight, scores, removed):
    """Return the weight without the `removed` lowest of each row of scores, by a stable sort."""
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :removed]
    return weight.masked_fill(
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True), 0
    )


def weights_of(model):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}


def prune_model(model, metric, target, windows, propagation="one-shot", **options):
    """Prune a model in memory, in place."""
    prune(ResidentStore(model), Recipe(metric, target, propagation), Texts(windows), **options)


def pruned_weights(model, metric, target, windows, propagation="one-shot"):
    copied = copy.deepcopy(model)
    prune_model(copied, metric, target, windows, propagation)
    return weights_of(copied)


def assert_same_weights(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def zeros(weight):
    return int((weight == 0).sum())


def error_of(*arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        prune_model(*arguments, **keywords)
    return str(caught.value)


# One-shot


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shot_removes_the_lowest_of_each_row_by_dense_statistics(family):
    model, windows = toy_model(family), toy_windows()
    dense = weights_of(model)
    X, G = own_activations(model, dense, windows), own_gradients(model, windows)
    expected = {
        name: keep_highest(w, w.abs() * (G[name] + X[name].sqrt()), w.shape[1] // 2)
        for name, w in dense.items()
    }
    assert_same_weights(pruned_weights(model, GBLM, ROW, windows), expected)


def test_one_shot_by_layer_lets_rows_compete():
    model, windows = toy_model("llama"), toy_windows()
    dense = weights_of(model)
    X = own_activations(model, dense, windows)
    expected = {
        name: keep_highest(
            w.reshape(1, -1), (w.abs() * X[name].sqrt()).reshape(1, -1), int(w.numel() * 0.3)
        ).reshape(w.shape)
        for name, w in dense.items()
    }
    actual = pruned_weights(model, WANDA, Target(0.3, Layer()), windows)
    assert_same_weights(actual, expected)


def test_one_shot_over_the_model_lets_layers_compete():
    model, windows = toy_model("llama"), toy_windows()
    dense = weights_of(model)
    G = own_gradients(model, windows)
    scores = torch.cat([(w.abs() * G[name]).flatten() for name, w in dense.items()])[None]
    everything = torch.cat([w.flatten() for w in dense.values()])[None]
    left = keep_highest(everything, scores, int(scores.numel() * 0.6))[0]
    pieces = left.split([w.numel() for w in dense.values()])
    expected = {
        name: piece.reshape(w.shape) for (name, w), piece in zip(dense.items(), pieces, strict=True)
    }
    actual = pruned_weights(model, SNIP, Target(0.6, Model()), windows)
    assert_same_weights(actual, expected)
    assert len({zeros(w) / w.numel() for w in actual.values()}) > 1


def test_one_shot_n_of_m_ranks_inside_groups_of_four_inputs():
    model, windows = toy_model("llama"), toy_windows()
    dense = weights_of(model)
    X = own_activations(model, dense, windows)
    expected = {
        name: keep_highest(
            w.reshape(len(w), -1, 4), (w.abs() * X[name].sqrt()).reshape(len(w), -1, 4), 2
        ).reshape(w.shape)
        for name, w in dense.items()
    }
    assert_same_weights(pruned_weights(model, WANDA, TWO_OF_FOUR, windows), expected)


# Sequential


def prune_naively(model, score, windows):
    """Prune rows by half, block after block, each time with a run of the whole model."""
    for block in decoder_blocks(model):
        names = [name for name in linear_layers(model) if name.startswith(f"{block}.")]
        X = own_activations(model, names, windows)
        for name in names:
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(
                    keep_highest(weight, score(name, weight.abs(), X[name]), weight.shape[1] // 2)
                )
    return weights_of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_equals_whole_runs_of_the_model_with_the_earlier_blocks_pruned(family):
    model, windows = toy_model(family, num_hidden_layers=2), toy_windows()
    actual = pruned_weights(model, WANDA, ROW, windows, "sequential")
    expected = prune_naively(copy.deepcopy(model), lambda _, W, X: W * X.sqrt(), windows)
    assert_same_weights(actual, expected)


def test_sequential_takes_gradients_from_the_dense_model():
    model, windows = toy_model("llama", num_hidden_layers=3), toy_windows()
    G = own_gradients(model, windows)
    actual = pruned_weights(model, GBLM, ROW, windows, "sequential")
    expected = prune_naively(
        copy.deepcopy(model), lambda name, W, X: W * (G[name] + X.sqrt()), windows
    )
    assert_same_weights(actual, expected)


def test_sequential_takes_all_input_statistics_from_the_blocks_pruned_before():
    model, windows = toy_model("llama", num_hidden_layers=3), toy_windows()
    metric = Metric.parse("mul(W, add(add(A, V), mul(0.01, B)))")
    actual = pruned_weights(model, metric, ROW, windows, "sequential")
    B = collect(ResidentStore(model), windows, frozenset("B"))["B"]
    expected = copy.deepcopy(model)
    for block in decoder_blocks(expected):
        found = collect(ResidentStore(expected), windows, frozenset("AV"))
        A, V = found["A"], found["V"]
        for name in [name for name in A if name.startswith(f"{block}.")]:
            weight = expected.get_submodule(name).weight.data
            scores = weight.abs() * (A[name] + V[name] + 0.01 * B[name])
            weight.copy_(keep_highest(weight, scores, weight.shape[1] // 2))
    assert_same_weights(actual, weights_of(expected))


def test_sequential_and_one_shot_agree_on_the_first_block_and_part_after_it():
    model, windows = toy_model("llama"), toy_windows()
    one_shot = pruned_weights(model, WANDA, ROW, windows)
    sequential = pruned_weights(model, WANDA, ROW, windows, "sequential")
    same = {name: torch.equal(one_shot[name], sequential[name]) for name in one_shot}
    assert all(same[name] for name in same if ".layers.0." in name)
    assert not all(same[name] for name in same if ".layers.1." in name)


# The bits that are written


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(weight):
    return weight.detach().view(BITS[weight.dtype])


@pytest.mark.parametrize("target", [ROW, Target(0.3, Layer()), Target(0.3, Model()), TWO_OF_FOUR])
@pytest.mark.parametrize("dtype", BITS)
def test_prune_writes_zeros_and_the_dense_bits_elsewhere(dtype, target):
    model = toy_model("llama", num_hidden_layers=1).to(dtype)
    for layer in linear_layers(model).values():
        special = [-0.0, 0.0, torch.finfo(dtype).tiny / 4, -torch.finfo(dtype).tiny / 4]
        layer.weight.data[-1, -4:] = torch.tensor(special, dtype=dtype)
    dense = weights_of(model)
    prune_model(model, MAGNITUDE, target, NO_WINDOWS)
    shapes = {
        "row": lambda rows, columns: (rows, columns),
        "layer": lambda rows, columns: (1, rows * columns),
        "2:4": lambda rows, columns: (rows * columns // 4, 4),
    }
    if target.group == Model():
        everything = torch.cat([weight.flatten() for weight in dense.values()])[None]
        kept = keep_highest(
            torch.ones_like(everything), everything.float().abs(), int(everything.numel() * 0.3)
        )[0].split([weight.numel() for weight in dense.values()])
    else:
        shape = shapes[target.group.name]
        kept = []
        for weight in dense.values():
            scores = weight.float().abs().reshape(shape(*weight.shape))
            removed = int(scores.shape[1] * target.sparsity)
            kept.append(keep_highest(torch.ones_like(scores), scores, removed))
    for (name, weight), ones in zip(weights_of(model).items(), kept, strict=True):
        stays = ones.reshape(weight.shape).bool()
        assert torch.equal(bits(weight)[stays], bits(dense[name])[stays])
        assert (bits(weight)[~stays] == 0).all()  # the bits of +0, never of -0


@pytest.mark.parametrize("dtype", BITS)
def test_restore_writes_the_dense_bits(dtype):
    store = ResidentStore(toy_model("llama").to(dtype))
    master = store.copies()
    first = next(iter(master.values()))
    first[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny / 4, float("nan")])
    for layer in linear_layers(store.model).values():
        layer.weight.data.fill_(float("nan"))
    store.restore(master)
    for name, weight in weights_of(store.model).items():
        assert torch.equal(bits(weight), bits(master[name]))


def test_restored_model_is_pruned_again():
    store = ResidentStore(toy_model("llama"))
    master = store.copies()
    for target in (ROW, TWO_OF_FOUR):
        store.restore(master)
        prune(store, Recipe(MAGNITUDE, target), Texts(NO_WINDOWS))
        expected = copy.deepcopy(store.model)
        ResidentStore(expected).restore(master)
        prune_model(expected, MAGNITUDE, target, NO_WINDOWS)
        assert_same_weights(weights_of(store.model), weights_of(expected))


# Counts, and what is left alone


@pytest.mark.parametrize("propagation", ["one-shot", "sequential"])
@pytest.mark.parametrize("target", [Target(0.3, Row()), Target(0.3, Layer()), TWO_OF_FOUR])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_lose_exactly_their_share(family, target, propagation):
    model = toy_model(family)
    prune_model(model, GBLM, target, toy_windows(), propagation)
    for name, weight in weights_of(model).items():
        rows, columns = weight.shape
        if target == TWO_OF_FOUR:
            expected = rows * columns // 2
            by_group = (weight.reshape(-1, 4) == 0).sum(1)
            assert (by_group == 2).all(), name
        elif target.group == Row():
            expected = rows * int(columns * 0.3)
        else:
            expected = int(rows * columns * 0.3)
        assert zeros(weight) == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_model_wide_threshold_removes_exactly_its_share_of_every_family(family):
    model = toy_model(family)
    prune_model(model, SNIP, Target(0.37, Model()), toy_windows())
    weights = weights_of(model).values()
    assert sum(zeros(w) for w in weights) == int(sum(w.numel() for w in weights) * 0.37)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_weights_and_all_other_parameters_stay_as_they_were(family):
    model = toy_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_model(model, GBLM, ROW, toy_windows(), "sequential")
    pruned = {f"{name}.weight" for name in linear_layers(model)}
    for name, value in model.state_dict().items():
        kept = value != 0 if name in pruned else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept]), name


def test_bf16_model_is_ranked_by_fp32_scores_and_stays_bf16():
    model = toy_model("llama").to(torch.bfloat16)
    dense = weights_of(model)
    prune_model(model, Metric.parse("exp(W)"), ROW, toy_windows())
    for name, weight in weights_of(model).items():
        assert weight.dtype == torch.bfloat16
        scores = dense[name].float().abs().exp()
        assert torch.equal(weight, keep_highest(dense[name], scores, weight.shape[1] // 2))


def test_zero_sparsity_removes_nothing():
    model = toy_model("llama")
    assert_same_weights(
        pruned_weights(model, MAGNITUDE, Target(0.0, Row()), toy_windows()), weights_of(model)
    )


def test_prune_leaves_no_scores_for_the_garbage_collector():
    model = toy_model("llama")
    kept: dict[str, torch.Tensor] = {}
    gc.disable()
    try:
        prune_model(model, SNIP, Target(0.5, Model()), toy_windows(), kept_scores=kept)
        scores = [weakref.ref(layer) for layer in kept.values()]
        del kept
        assert scores and not any(reference() is not None for reference in scores)
    finally:
        gc.enable()


def test_metric_of_weights_alone_runs_no_calibration():
    model = toy_model("llama")
    model.model.forward = None  # would fail if it were called
    prune_model(model, MAGNITUDE, ROW, toy_windows())
    assert {zeros(w) / w.numel() for w in weights_of(model).values()} == {0.5}


@pytest.mark.parametrize(
    ("metric", "propagation", "expected"),
    [
        (MAGNITUDE, "one-shot", ["prune"]),
        (WANDA, "one-shot", ["prune"]),
        (GBLM, "one-shot", ["forward", "backward", "prune"]),
        (WANDA, "sequential", ["prune"]),
        (GBLM, "sequential", ["forward", "backward", "prune"]),
    ],
)
def test_progress_counts_the_blocks_of_every_walk(metric, propagation, expected):
    seen = []
    prune_model(
        *(toy_model("llama"), metric, ROW, toy_windows(count=3), propagation),
        on_progress=lambda *stage: seen.append(stage),
    )
    assert seen == [(stage, done, 2) for stage in expected for done in (0, 1, 2)]


# What is refused


def test_constant_scores_name_the_layer():
    model = toy_model("llama")
    model.get_submodule(UP_PROJ).weight.data.fill_(0.5)
    expected = f"layer {UP_PROJ}: the scores of 'W' are constant"
    assert error_of(model, MAGNITUDE, ROW, toy_windows()) == expected
    assert error_of(model, MAGNITUDE, Target(0.5, Model()), toy_windows()) == expected
    assert error_of(model, MAGNITUDE, ROW, toy_windows(), "sequential") == expected


@pytest.mark.parametrize("text", ["mul(W, sqrt(X))", "exp(mul(W, exp(exp(W))))"])
def test_scores_that_are_not_finite_name_the_layer(text):
    model = toy_model("llama")
    weight = model.get_submodule(UP_PROJ).weight
    weight.data[0, 0] = float("nan") if text.startswith("mul") else 10.0
    expected = f"layer {UP_PROJ}: the scores of '{text}' are not finite"
    assert error_of(model, Metric.parse(text), ROW, toy_windows(), "sequential") == expected


@pytest.mark.parametrize("propagation", ["one-shot", "sequential"])
def test_pattern_that_does_not_divide_a_layer_is_refused_before_anything_changes(propagation):
    model = toy_model("llama", intermediate_size=26)
    before = weights_of(model)
    message = error_of(model, WANDA, TWO_OF_FOUR, toy_windows(), propagation)
    assert message == (
        "pattern must divide the inputs of every layer, got 4 of 26 in model.layers.0.mlp.down_proj"
    )
    assert_same_weights(weights_of(model), before)


def test_sequential_cannot_serve_a_model_wide_threshold():
    model = toy_model("llama")
    message = error_of(model, SNIP, Target(0.5, Model()), toy_windows(), "sequential")
    assert message == (
        "propagation must be one-shot with group model, whose threshold needs every layer's "
        "scores before the first is pruned; got 'sequential'"
    )
    prune_model(model, SNIP, TWO_OF_FOUR, toy_windows(), "sequential")


def test_unknown_propagation_is_refused():
    assert error_of(toy_model("llama"), WANDA, ROW, toy_windows(), "both") == (
        "propagation must be one of one-shot, sequential; got 'both'"
    )


def test_metric_that_cannot_rank_weights_is_refused():
    message = error_of(toy_model("llama"), Metric.parse("sqrt(X)"), ROW, toy_windows())
    assert message.startswith("metric 'sqrt(X)' gives every row the same scores: ")
