"""The walk over blocks against loops over whole models, for every family."""

import math

import pytest
import torch
from refusals import refusal
from toy_models import FAMILIES, assert_same_tensors, toy_model, toy_windows, weights_of

import prunevolve
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import decoder_blocks, linear_layers
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import collect, prune
from prunevolve.pruning.store import ResidentStore

GBLM = Metric.parse("mul(W, add(G, sqrt(X)))")
MAGNITUDE = Metric.parse("W")
ROW = Target(0.5, Row())
TARGETS = [ROW, Target(0.3, Layer()), Target(0.5, NOfM(2, 4)), Target(0.6, Model())]
UP_PROJ = "model.layers.1.mlp.up_proj"
NO_WINDOWS = torch.empty(0, 8, dtype=torch.int64)


def collected(model, windows, terminals):
    return collect(ResidentStore(model), windows, frozenset(terminals))


def masks_of(scores, target):
    return dict(target.group.select(scores.__getitem__, dict.fromkeys(scores, target.sparsity)))


def prune_model(model, metric, target, windows, propagation="one-shot", **options):
    recipe = Procedure(metric, target, propagation == "sequential")
    prune(ResidentStore(model), recipe, {"calibration": windows}, **options)


WAYS = [
    *(("one-shot", target) for target in TARGETS),
    *(("sequential", target) for target in TARGETS[:3]),
]


@pytest.mark.parametrize(("propagation", "target"), WAYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowest_of_each_group_go_by_statistics_behind_the_blocks_pruned_before(
    family, propagation, target
):
    expected, model, windows = toy_model(family), toy_model(family), toy_windows()
    prune_model(model, GBLM, target, windows, propagation)
    G = collected(expected, windows, "G")  # of the dense model
    dense = weights_of(expected)
    for part in decoder_blocks(expected) if propagation == "sequential" else [""]:
        X = collected(expected, windows, "X")
        scores = {
            name: weight.abs() * (G[f"G/{name}"] + X[f"X/{name}"].sqrt())
            for name, weight in dense.items()
            if name.startswith(part)
        }
        for name, mask in masks_of(scores, target).items():
            expected.get_submodule(name).weight.data.masked_fill_(mask, 0)
    assert_same_tensors(model.state_dict(), expected.state_dict())


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
    scores = {name: weight.float().abs() for name, weight in dense.items()}
    masks = masks_of(scores, target)
    for name, weight in weights_of(model).items():
        kept = ~masks[name]
        assert torch.equal(bits(weight)[kept], bits(dense[name])[kept])
        assert (bits(weight)[~kept] == 0).all()  # the bits of +0, never of -0


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


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"metric": "wanda"}, ["prune"]),
        ({"metric": "pruner-zero"}, ["forward", "backward", "measure"]),
        ({"metric": "snip"}, ["forward", "backward", "prune"]),
        ({"metric": "gblm", "propagation": "sequential"}, ["forward", "backward", "prune"]),
        ({"recipe": "fast"}, ["forward", "backward", "prune"]),
    ],
    ids=str,
)
def test_passes_are_run_block_by_block(options, names, unguarded):
    seen = []
    prunevolve.prune(
        toy_model("llama"),
        windows=toy_windows(),
        on_progress=lambda *progress: seen.append(progress),
        **options,
    )
    assert seen == [(name, blocks, 2) for name in names for blocks in (0, 1, 2)]
