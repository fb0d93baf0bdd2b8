"""Pruning a model in memory from Python: the engine's masks, counted zeros, one-line errors."""

import re
from inspect import signature
from typing import Unpack, get_type_hints

import pytest
import torch
from refusals import refusal
from toy_models import assert_same_tensors, toy_model, toy_windows, weights_of

from prunevolve import Criterion, Metric, Statistics, collect_statistics, prune, read_metric
from prunevolve.pruning.run.options import Method, MethodArguments

FIRST = "model.layers.0.self_attn.q_proj"
OTHER = Statistics({f"G/{FIRST}": torch.ones(2, 2)})
SHAPE = (
    "windows must be a tensor (N, T) with N of 1 or more and T of 2 to 64, the model's context; "
    "got {}"
)
WANDA = Metric.parse("mul(W, sqrt(X))")


@pytest.mark.parametrize(
    ("metric", "settings", "asked"),
    [
        (read_metric("snip"), {"sparsity": 0.4}, ("model", "unstructured", 0.4)),
        (Criterion(WANDA, "layer"), {"sparsity": 0.25}, ("layer", "unstructured", 0.25)),
        ("mul(W, sqrt(X))", {"pattern": "2:4"}, (None, "2:4", 0.5)),
        (WANDA, {"propagation": "sequential"}, ("row", "unstructured", 0.5)),
        ("magnitude", {"windows": None}, ("layer", "unstructured", 0.5)),
    ],
)
def test_prune_takes_a_metric_in_every_form_and_reports_what_it_counts(metric, settings, asked):
    model = toy_model("llama")
    report = prune(model, metric, **{"windows": toy_windows(), **settings})
    assert (report.group, report.pattern) == asked[:2]
    assert report.sparsity == pytest.approx(asked[2], abs=0.01)
    zeros = {name: int((weight == 0).sum()) for name, weight in weights_of(model).items()}
    assert {layer.name: layer.zeros for layer in report.layers} == zeros
    assert all(layer.pattern_ok for layer in report.layers)


def test_statistics_take_the_place_of_windows_and_stay_as_they_are():
    statistics = collect_statistics(toy_model("llama"), {"W", "X", "G"}, toy_windows())
    before = {key: tensor.clone() for key, tensor in statistics.items()}
    for metric in ("wanda", "gblm", "snip"):
        with_windows, without = toy_model("llama"), toy_model("llama")
        prune(with_windows, metric, toy_windows())
        prune(without, metric, statistics=statistics)
        assert_same_tensors(weights_of(without), weights_of(with_windows))
    assert_same_tensors(statistics, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": None}, "windows must be given for metric 'mul(W, G)', which needs G; got "),
        ({"windows": None, "statistics": OTHER}, f"statistics must be this model's: G of {FIRST} "),
        ({"windows": toy_windows()[0]}, SHAPE.format("(12,)")),
        ({"windows": [[5, 6]]}, SHAPE.format("list")),
        ({"windows": torch.ones(1, 65, dtype=torch.int64)}, SHAPE.format("(1, 65)")),
        ({"windows": torch.ones(1, 4)}, "windows must be token ids, of an integer dtype; got "),
        ({"windows": torch.full((1, 4), 61)}, "windows must hold ids from 0 to 60, got 61 to 61"),
        ({"recipe": "bset"}, "recipe 'bset' cannot be read: No such file or directory; give best"),
        ({"updat": "none"}, "prune has an unknown option 'updat': did you mean update? "),
        ({"pattern": "5:12"}, "pattern must divide the inputs of every layer, got 12 of 16 in "),
    ],
)
def test_prune_refuses_a_wrong_argument_in_one_line_and_touches_nothing(settings, message):
    model = toy_model("llama")
    before = weights_of(model)
    given = {"windows": toy_windows(), **settings}
    assert refusal(lambda: prune(model, "snip", **given)).startswith(message)
    assert_same_tensors(weights_of(model), before)


def test_recipe_is_the_command_lines_with_other_arguments_over_it():
    by_recipe, expected = toy_model("llama"), toy_model("llama")
    report = prune(by_recipe, windows=toy_windows(), recipe="best", sparsity=0.6)
    best = {"update": "reconstruct", "sparsity": 0.6}
    assert report == prune(expected, "directed-snip-deviation", toy_windows(), **best)
    assert_same_tensors(weights_of(by_recipe), weights_of(expected))
    given = prune(toy_model("llama"), "wanda", toy_windows(), recipe="best", pattern="2:4")
    assert (given.metric, given.pattern) == ("mul(W, sqrt(X))", "2:4")
    own = prune(toy_model("llama"), windows=toy_windows(), recipe="fast", pattern="2:4")
    assert own.metric == "quot(sqr(W), H)"


def test_keywords_that_mypy_and_editors_know_are_the_fields_of_the_command_line():
    fields = {name: field.annotation for name, field in Method.model_fields.items()}
    assert get_type_hints(MethodArguments) == fields
    assert signature(prune).parameters["options"].annotation == Unpack[MethodArguments]


def test_metric_or_model_of_another_kind_and_an_unknown_leaf_are_refused():
    wrong = refusal(lambda: prune("embedded", "wanda"))
    assert wrong == "model must be one of transformers, got str"
    for missing in (None, ["wanda"]):
        message = refusal(prune, toy_model("llama"), missing)
        assert message.startswith("metric must be a Metric, a Criterion or what read_metric reads")
        assert message.endswith(f"got {type(missing).__name__}, and no recipe's")
    empty = toy_model("llama")
    del empty.model.layers[:]
    assert refusal(prune, empty, "magnitude") == "model llama has no linear layers to prune"
    training = refusal(lambda: prune(toy_model("llama").train(), "magnitude"))
    assert training.startswith("model must be in evaluation mode")
    unknown = refusal(lambda: collect_statistics(toy_model("llama"), "XQ", toy_windows()))
    assert unknown.startswith("terminals must be among W, G, X, ")


@pytest.mark.parametrize("update", ["none", "sparsegpt", "reconstruct"])
@pytest.mark.parametrize("skip", [r"layers\.0\.", "down_proj|q_proj"])
def test_skipped_layers_stay_as_they_are_and_are_not_counted(update, skip):
    model, before = toy_model("llama"), weights_of(toy_model("llama"))
    report = prune(model, "snip", toy_windows(), sparsity=0.5, update=update, skip=skip)
    counted = {layer.name for layer in report.layers}
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    for name, weight in weights_of(model).items():
        assert (name not in counted) == bool(re.search(skip, name))
        assert torch.equal(weight, before[name]) == (name not in counted), name
    assert len(prune(model, "magnitude").layers) == len(before)  # none is skipped from now on
