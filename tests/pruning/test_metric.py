"""The metric language: text and JSON in and out, what a metric knows of itself, and its scores."""

import json
import pickle
from functools import partial, reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from toy_metrics import random_terminals, trees

from prunevolve.pruning.formula import MAX_CHARACTERS, MAX_DEPTH
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import read_tree
from prunevolve.pruning.statistics import TERMINALS

EXAMPLES = settings(deadline=None, max_examples=50)
PRUNER_ZERO = "mul(abs(mul(W, W)), mms(G))"
PRUNER_ZERO_JSON = {
    "data": "mul",
    "left": {"data": "abs", "left": {"data": "mul", "left": {"data": "W"}, "right": {"data": "W"}}},
    "right": {"data": "mms", "left": {"data": "G"}},
}
LEAF = {"data": "W"}
TEXT = "mul(W, add(mul(0.5, G), sqrt(X)))"

MAGNITUDES = st.floats(1e-37, 1e37)
NUMBERS = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda x: -x))
ENDS = st.one_of(st.sampled_from(sorted(TERMINALS)).map(Metric), NUMBERS.map(Metric.constant))
METRICS = trees(ENDS, max_leaves=12)


@EXAMPLES
@given(METRICS)
def test_text_and_release_json_read_back_node_for_node(metric):
    again = Metric.parse(metric.text)
    assert again == metric
    assert hash(again) == hash(metric)
    assert read_tree(json.loads(json.dumps(metric.to_release_json()))) == metric


def test_release_json_of_the_published_metric():
    assert Metric.parse(PRUNER_ZERO).to_release_json() == PRUNER_ZERO_JSON
    assert read_tree(PRUNER_ZERO_JSON).text == PRUNER_ZERO


def test_leaves_size_and_depth_whatever_the_spacing():
    assert Metric.parse("abs(" * MAX_DEPTH + "W" + ")" * MAX_DEPTH).depth == MAX_DEPTH
    metric = Metric.parse("  add (W,\n\tneg(neg( neg(X) )))\n")
    assert metric.text == "add(W, neg(neg(neg(X))))"
    assert (metric.terminals, metric.size, metric.depth) == (frozenset("WX"), 6, 4)


@pytest.mark.filterwarnings("ignore:std")
@EXAMPLES
@given(METRICS)
def test_shape_agrees_with_the_scores_tensor(metric):
    scores = metric.score(**random_terminals(3, 5))
    divides = any(node.name in ("div", "divrms") for node in metric.nodes())
    for side, (length, varies) in enumerate(zip((3, 5), metric.shape, strict=True)):
        if not divides:
            assert scores.shape[side] == (length if varies else 1)
        spread = scores.select(side, 0).unsqueeze(side).expand_as(scores)
        assert varies or torch.equal(scores.nan_to_num(), spread.nan_to_num())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("div(X, W)", "gives all rows the same scores: "),  # as in the release
        ("mul(W, rowsum(B))", "has rowsum(B): rowsum needs what varies by input"),
        ("mul(W, div(W, 2))", "has div(W, 2): div divides by a norm: use quot or mul for a number"),
    ],
)
def test_metric_that_cannot_rank_the_weights_of_a_matrix_is_refused(text, problem):
    message = refusal(Metric.check_scores_weights, Metric.parse(text))
    assert message.startswith(f"metric '{text}' {problem}")


@pytest.mark.parametrize(
    ("written", "printed"),
    [("0.50", "0.5"), ("1000000", "1e+06"), ("-0.0", "0"), ("-2e-3", "-0.002")],
)
def test_number_is_printed_as_short_as_fp32_allows(written, printed):
    metric = Metric.parse(f"add(W, {written})")
    assert metric.text == f"add(W, {printed})"
    assert read_tree({"data": written}).text == printed
    assert metric.terminals == {"W"}


@EXAMPLES
@given(NUMBERS)
def test_number_keeps_its_fp32_value_through_its_text(value):
    written = Metric.constant(value)
    assert torch.equal(written.score(), torch.tensor([[value]]))
    assert Metric.constant(written.value) == Metric.parse(written.text) == written


@pytest.mark.parametrize("written", ["-1e999", "1e-38"])
def test_number_that_fp32_does_not_hold_is_refused(written):
    message = refusal(Metric.parse, f"mul(W, {written})")
    assert message.startswith("a number must be 0 or within (1e-37, 1e+38) in size, got ")


def test_score_is_computed_in_fp32_from_bf16_with_numbers_too():
    W = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    scores = Metric.parse("mul(-0.5, mul(W, W))").score(W=W)
    # 1.0078125 squared needs 15 bits; in bf16 it would round to 1.015625.
    assert (scores.dtype, scores.tolist()) == (torch.float32, [[-0.5, -0.507843017578125]])


def test_score_refuses_shapes_that_do_not_go_together():
    score = partial(Metric.parse("mul(W, X)").score, W=torch.ones(2, 3), X=torch.ones(1, 4))
    expected = "terminals must be those of one matrix, got W of (2, 3), X of (1, 4)"
    assert refusal(score) == expected


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("mul(W, srt(X))", 8, "'srt' is unknown: did you mean sqrt? terminals are W, G, X, "),
        ("add(W, abs(W, G))", 8, "abs takes 1 operand(s), not 2"),
        ("abs(x=W)", 6, "'=' is not in the language; "),
        ("torch.abs(W)", 1, "this is neither a call nor a terminal; "),
        ("mul(W, G", 4, "missing )"),
        ("mul(W, 1_0)", 8, "this is neither a call nor a terminal; "),  # which float reads
        ("mul(W, G, **X)", 1, "this is neither a call nor a terminal; "),
        ("W | G", 1, "this is neither a call nor a terminal; "),
        ("*".join("W" * 34), 1, "this is deeper than 32 levels"),
        ("abs(" * 33 + "W" + ")" * 33, 133, "this is deeper than 32 levels"),
        ("(" * 30 + "M" + "**5)" * 30, 1, "this is deeper than 32 levels"),
    ],
)
def test_parse_refuses(text, column, problem):
    excerpt = text[max(0, column - 31) : column + 29]
    message = f"metric '{excerpt}', at column {column}: {problem}"
    assert refusal(Metric.parse, text).startswith(message)


HOSTILE = ["not " * 4900 + "W", "W" + "(W)" * 6000, "9" * 5000, "W+" * 9000 + "W", "-" * 9000 + "W"]


@pytest.mark.parametrize("text", HOSTILE)
def test_parse_refuses_what_its_parser_does_not_take(text):
    # How deep Python's own parser goes depends on its version.
    message = refusal(Metric.parse, text)
    assert any(f"this is {x}" in message for x in ("malformed", "neither", "deeper"))


def test_parse_does_not_look_into_a_text_that_is_too_long():
    message = f"metric '{'(' * 40}'... is longer than {MAX_CHARACTERS} characters"
    assert refusal(Metric.parse, "(" * 10_000_000) == message


@pytest.mark.parametrize(
    "tree",
    [
        {"data": "abs", "left": LEAF, "key": 0},
        *({"data": "abs", "left": node} for node in ("W", {}, {"data": "W, G"})),
        reduce(lambda tree, _: {"data": "abs", "left": tree}, range(MAX_DEPTH + 1), LEAF),
    ],
    ids=str,
)
def test_read_tree_refuses_what_is_no_node_of_the_release(tree):
    assert refusal(read_tree, tree).startswith("metric: a tree must have nodes ")


def test_criterion_reads_metric_and_group_and_refuses_what_cannot_rank():
    criterion = Criterion.parse(TEXT, "layer")
    assert (criterion.metric, criterion.group) == (Metric.parse(TEXT), "layer")
    assert (criterion.text, str(criterion)) == (TEXT, f"layer:{TEXT}")
    unknown = "group must be one of row, layer, model, outputs, got '2:4'"
    assert refusal(Criterion.parse, "W", "2:4") == unknown
    assert refusal(Criterion.parse, "X", "row").startswith("metric 'X' gives all rows the same")


def test_criterion_crosses_to_another_process_as_its_text_alone_whatever_is_cached():
    fresh, used = pickle.dumps(Metric.parse(TEXT)), Metric.parse(TEXT)
    used.score(W=torch.ones(2, 2), G=torch.ones(2, 2), X=torch.ones(1, 2))
    assert pickle.dumps(used) == fresh and len(fresh) < len(TEXT) + 100
    criteria = {Criterion(Metric.parse(text), "row") for text in ("1e+30", "mul(W, -0.1)", TEXT)}
    assert pickle.loads(pickle.dumps(criteria)) == criteria
