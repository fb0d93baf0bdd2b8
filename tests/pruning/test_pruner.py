"""The walk over blocks against masks and loops written out here, for every family."""

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
from refusals import refusal
from toy_models import (
    FAMILIES,
    assert_same_tensors,
    own_gradients,
    own_inputs,
    toy_model,
    toy_windows,
    weights_of,
)

import prunevolve
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import decoder_blocks, linear_layers
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.run.options import read_recipe
from prunevolve.pruning.store import ResidentStore

GBLM = Metric.parse("mul(W, add(G, sqrt(X)))")
MAGNITUDE = Metric.parse("W")
ROW = Target(0.5, Row())
TARGETS = [ROW, Target(0.3, Layer()), Target(0.5, NOfM(2, 4)), Target(0.6, Model())]
UP_PROJ = "model.layers.1.mlp.up_proj"
NO_WINDOWS = torch.empty(0, 8, dtype=torch.int64)


def own_activations(model, names, windows):
    """Return the mean over windows of each named layer's squared input norms, (1, in)."""
    inputs = own_inputs(model, {name: model.get_submodule(name) for name in names}, windows)
    totals = {name: sum(x.square().sum(0, keepdim=True) for x in inputs[name]) for name in names}
    return {name: total / len(windows) for name, total in totals.items()}


def root_of_gradients(model, windows):
    """Return the root of the summed squares of the gradients times 100, (out, in)."""
    found = own_gradients(model, linear_layers(model), windows)
    return {name: sum((100 * g) ** 2 for g, _ in pairs).sqrt() for name, pairs in found.items()}


def keep_highest(weight, scores, removed):
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :removed]
    return weight.masked_fill(
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True), 0
    )


def keep_highest_in_groups(weights, scores, target):
    if target.group == Model():
        flat = [torch.cat([x.flatten() for x in some.values()])[None] for some in (weights, scores)]
        left = keep_highest(*flat, int(flat[0].numel() * target.sparsity))[0]
        pieces = left.split([weight.numel() for weight in weights.values()])
        return {
            name: piece.reshape(weight.shape)
            for (name, weight), piece in zip(weights.items(), pieces, strict=True)
        }
    kept = {}
    for name, weight in weights.items():
        width = {"row": weight.shape[1], "layer": weight.numel(), "2:4": 4}[target.group.name]
        competing = [x.reshape(-1, width) for x in (weight, scores[name])]
        kept[name] = keep_highest(*competing, int(width * target.sparsity)).reshape(weight.shape)
    return kept


def prune_model(model, metric, target, windows, propagation="one-shot", **options):
    recipe = Procedure(metric, target, propagation == "sequential")
    prune(ResidentStore(model), recipe, {"calibration": windows}, **options)


def pruned_state(model, *arguments):
    copied = copy.deepcopy(model)
    prune_model(copied, *arguments)
    return copied.state_dict()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.group.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_shot_removes_the_lowest_of_each_group_by_dense_statistics(family, target):
    model, windows = toy_model(family), toy_windows()
    dense = weights_of(model)
    X, G = own_activations(model, dense, windows), root_of_gradients(model, windows)
    scores = {name: w.abs() * (G[name] + X[name].sqrt()) for name, w in dense.items()}
    kept = keep_highest_in_groups(dense, scores, target)
    expected = model.state_dict() | {f"{name}.weight": weight for name, weight in kept.items()}
    assert_same_tensors(pruned_state(model, GBLM, target, windows), expected)


@pytest.mark.parametrize("target", TARGETS[:3], ids=lambda target: target.group.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_equals_whole_runs_with_the_earlier_blocks_pruned(family, target):
    model, windows = toy_model(family), toy_windows()
    G = root_of_gradients(model, windows)  # of the dense model
    actual = pruned_state(model, GBLM, target, windows, "sequential")
    expected = copy.deepcopy(model)
    for block in decoder_blocks(expected):
        dense = weights_of(expected)
        weights = {name: dense[name] for name in dense if name.startswith(f"{block}.")}
        X = own_activations(expected, weights, windows)
        scores = {name: w.abs() * (G[name] + X[name].sqrt()) for name, w in weights.items()}
        for name, kept in keep_highest_in_groups(weights, scores, target).items():
            expected.get_submodule(name).weight.data.copy_(kept)
    assert_same_tensors(actual, expected.state_dict())


BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(weight):
    return weight.detach().view(BITS[weight.dtype])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.group.name)
@pytest.mark.parametrize("dtype", BITS)
def test_prune_writes_zeros_and_the_dense_bits_elsewhere(dtype, target):
    model = toy_model("llama", num_hidden_layers=1).to(dtype)
    for layer in linear_layers(model).values():
        special = [-0.0, 0.0, torch.finfo(dtype).tiny / 4, -torch.finfo(dtype).tiny / 4]
        layer.weight.data[-1, -4:] = torch.tensor(special, dtype=dtype)
    dense = weights_of(model)
    prune_model(model, MAGNITUDE, target, NO_WINDOWS)
    ones = {name: torch.ones_like(weight) for name, weight in dense.items()}
    scores = {name: weight.float().abs() for name, weight in dense.items()}
    stays = keep_highest_in_groups(ones, scores, target)
    for name, weight in weights_of(model).items():
        kept = stays[name].bool()
        assert torch.equal(bits(weight)[kept], bits(dense[name])[kept])
        assert (bits(weight)[~kept] == 0).all()  # the bits of +0, never of -0


@pytest.mark.parametrize("dtype", BITS)
def test_restore_writes_the_dense_bits(dtype):
    store = ResidentStore(toy_model("llama").to(dtype))
    master = weights_of(store.model)
    first = next(iter(master.values()))
    first[0, :4] = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny / 4, float("nan")])
    for layer in linear_layers(store.model).values():
        layer.weight.data.fill_(float("nan"))
    store.restore(master)
    assert_same_tensors(weights_of(store.model), master)


@pytest.mark.parametrize(
    ("text", "target", "propagation", "value", "problem"),
    [
        ("W", ROW, "one-shot", 0.5, "constant"),
        ("W", Target(0.5, Model()), "one-shot", 0.5, "constant"),
        ("W", ROW, "sequential", 0.5, "constant"),
        ("mul(W, sqrt(X))", ROW, "sequential", math.nan, "not finite"),
        ("exp(mul(W, exp(exp(W))))", ROW, "sequential", 10.0, "not finite"),
    ],
)
def test_scores_that_rank_nothing_name_the_layer(text, target, propagation, value, problem):
    model = toy_model("llama")
    weight = model.get_submodule(UP_PROJ).weight.data
    (weight if problem == "constant" else weight[0, :1]).fill_(value)
    message = refusal(prune_model, model, Metric.parse(text), target, toy_windows(), propagation)
    assert message == f"layer {UP_PROJ}: the scores of '{text}' are {problem}"


def test_products_of_fp32_are_exact_in_a_pruning_and_as_they_were_after_it():
    settings, seen = torch.backends.cuda.matmul, []

    def update(weight, removal, gram):
        seen.append(settings.fp32_precision)
        return weight, 0

    model = toy_model("llama")
    recipe = Procedure(MAGNITUDE, ROW, update=update)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(settings.fp32_precision))
    torch.set_float32_matmul_precision("high")
    try:
        prune(ResidentStore(model), recipe, {"calibration": toy_windows()})
        assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high" and settings.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


WRITTEN = runpy.run_path(str(Path(__file__).parents[2] / "scripts/write_generated.py"))


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        ("--metric wanda", ["prune"]),
        ("--metric pruner-zero", ["forward", "backward", "measure"]),
        ("--metric snip", ["forward", "backward", "threshold", "prune"]),
        ("--metric gblm --propagation sequential", ["forward", "backward", "prune"]),
        ("--recipe fast", ["forward", "backward", "threshold", "prune"]),
    ],
)
def test_listed_passes_are_run_block_by_block(request_, names, unguarded):
    assert [one.name for one in WRITTEN["passes"](request_)] == names
    given = dict(zip(request_.replace("--", "").split()[::2], request_.split()[1::2], strict=True))
    options = read_recipe(given["recipe"], None) if "recipe" in given else given
    seen = []
    prunevolve.prune(
        toy_model("llama"),
        options.pop("metric"),
        toy_windows(),
        on_progress=lambda *progress: seen.append(progress),
        **options,
    )
    walks = [name for name in names if name != "threshold"]
    assert seen == [(name, blocks, 2) for name in walks for blocks in (0, 1, 2)]
