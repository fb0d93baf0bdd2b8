"""Pruning a model in memory from Python: the engine's masks, counted zeros, one-line errors."""

import re

import pytest
import torch
from toy_models import toy_model, toy_windows

from prunevolve import Criterion, Metric, Statistics, collect_statistics, prune, read_metric
from pruning import pruner
from pruning.masks import Target, group_of
from pruning.models import linear_layers
from pruning.recipe import Recipe
from pruning.store import ResidentStore
from pruning.walk import Texts, collect

FIRST = "model.layers.0.self_attn.q_proj"
WANDA = Metric.parse("mul(W, sqrt(X))")


def weights_of(model):
    return {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}


def refusal(call):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_prune_is_the_engines():
    model, expected = toy_model("llama"), toy_model("llama")
    prune(model, read_metric("snip"), toy_windows(), sparsity=0.4)
    recipe = Recipe(Metric.parse("mul(W, G)"), Target(0.4, group_of("model")))
    pruner.prune(ResidentStore(expected), recipe, Texts(toy_windows()))
    for name, weight in weights_of(expected).items():
        assert torch.equal(weights_of(model)[name], weight), name


@pytest.mark.parametrize(
    ("metric", "settings", "asked"),
    [
        (WANDA, {}, ("row", "unstructured", 0.5)),
        (Criterion(WANDA, "layer"), {"sparsity": 0.25}, ("layer", "unstructured", 0.25)),
        ("snip", {"sparsity": 0.25}, ("model", "unstructured", 0.25)),
        ("snip", {"sparsity": 0.25, "group": "row"}, ("row", "unstructured", 0.25)),
        ("mul(W, sqrt(X))", {"pattern": "2:4"}, (None, "2:4", 0.5)),
        ("wanda", {"propagation": "sequential"}, ("row", "unstructured", 0.5)),
    ],
)
def test_prune_takes_a_metric_in_every_form_and_reports_what_it_counts(metric, settings, asked):
    model = toy_model("llama")
    report = prune(model, metric, toy_windows(), **settings)
    assert (report.group, report.pattern) == asked[:2]
    assert report.sparsity == pytest.approx(asked[2], abs=0.01)
    weights = weights_of(model)
    assert [layer.name for layer in report.layers] == list(weights)
    assert [layer.zeros for layer in report.layers] == [
        int((w == 0).sum()) for w in weights.values()
    ]
    assert report.size == sum(weight.numel() for weight in weights.values())
    assert all(layer.pattern_ok for layer in report.layers)


def test_statistics_take_the_place_of_windows_and_stay_as_they_are():
    leaves = {"X", "G"}
    statistics = collect_statistics(toy_model("llama"), leaves, toy_windows())
    before = {key: tensor.clone() for key, tensor in statistics.to_tensors().items()}
    for metric in ("wanda", "gblm", "snip"):
        with_windows, without = toy_model("llama"), toy_model("llama")
        prune(with_windows, metric, toy_windows())
        prune(without, metric, statistics=statistics)
        for name, weight in weights_of(with_windows).items():
            assert torch.equal(weights_of(without)[name], weight), (metric, name)
    after = statistics.to_tensors()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_collect_statistics_is_the_walks_and_changes_no_weight():
    model = toy_model("llama")
    before = weights_of(model)
    found = collect_statistics(model, WANDA.leaves | {"B"}, toy_windows()).to_tensors()
    expected = collect(ResidentStore(model), toy_windows(), frozenset("XB")).to_tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())


def test_prune_by_weights_alone_needs_no_windows():
    assert prune(toy_model("llama"), "magnitude", sparsity=0.5).sparsity == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "windows must be given for metric 'mul(W, G)', which needs G; got None"),
        (
            {"statistics": Statistics({"X": {}})},
            "windows must be given for metric 'mul(W, G)', which needs G; got None",
        ),
        (
            {"statistics": Statistics({"G": {FIRST: torch.ones(2, 2)}})},
            f"statistics must be this model's: G of {FIRST} must be (16, 16), got (2, 2)",
        ),
        ({"windows": toy_windows()[0]}, "windows must be (N, T) with N of 1 and"),
        ({"windows": toy_windows()[:, :1]}, "windows must be (N, T) with N of 1 and"),
        ({"windows": torch.ones(3, 4)}, "windows must be token ids, of an integer dtype; got"),
        (
            {"windows": torch.full((1, 4), 61)},
            "windows must hold ids from 0 to 60, got 61 to 61",
        ),
        ({"windows": toy_windows(), "sparsity": 1.0}, "sparsity must be in [0, 1), got 1.0"),
        ({"windows": toy_windows(), "group": "column"}, "group must be one of row, layer, model"),
        ({"windows": toy_windows(), "propagation": "both"}, "propagation must be one of one-shot"),
        (
            {"windows": toy_windows(), "propagation": "sequential"},
            "propagation must be one-shot with group model, whose threshold needs every layer's "
            "scores before the first is pruned; got 'sequential'",
        ),
        (
            {"windows": toy_windows(), "pattern": "5:12"},
            "pattern must divide the inputs of every layer, got 12 of 16 in model.layers.0.self",
        ),
    ],
)
def test_prune_refuses_a_wrong_argument_in_one_line_and_touches_nothing(settings, message):
    model = toy_model("llama")
    before = weights_of(model)
    assert refusal(lambda: prune(model, "snip", **settings)).startswith(message)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(model).items())


def test_sequential_statistics_are_not_those_of_the_dense_model():
    statistics = collect_statistics(toy_model("llama"), "X", toy_windows())
    message = refusal(
        lambda: prune(toy_model("llama"), "wanda", statistics=statistics, propagation="sequential")
    )
    assert re.match(r"windows must be given .* which needs X; got None", message)


def test_model_in_training_is_refused():
    model = toy_model("llama").train()
    for call in (
        lambda: prune(model, "magnitude"),
        lambda: collect_statistics(model, "X", toy_windows()),
    ):
        assert refusal(call).startswith("model must be in evaluation mode")


def test_unknown_leaf_is_refused():
    message = refusal(lambda: collect_statistics(toy_model("llama"), "XQ", toy_windows()))
    assert message.startswith("leaves must be among W, G, X, ")
    assert message.endswith("; got 'Q'")
