"""The metric language: text and JSON in and out, and everything that it refuses."""

import json
import pickle
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal
from toy_metrics import trees

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import LEAVES
from prunevolve.pruning.syntax import MAX_CHARACTERS, MAX_DEPTH

EXAMPLES = settings(deadline=None)
PRUNER_ZERO = "mul(abs(mul(W, W)), mms(G))"
PRUNER_ZERO_JSON = {
    "data": "mul",
    "left": {"data": "abs", "left": {"data": "mul", "left": {"data": "W"}, "right": {"data": "W"}}},
    "right": {"data": "mms", "left": {"data": "G"}},
}
VOCABULARY = f"leaves are {', '.join(LEAVES)} and numbers, operators {', '.join(OPERATORS)}"
LEAF = {"data": "W"}
TEXT = "mul(W, add(mul(0.5, G), sqrt(X)))"
GUESS = f"did you mean sqrt?; {VOCABULARY}"
CALLS = "a formula is nested calls, such as mul(W, sqrt(X))"
NEITHER = "has something that is neither an operator call nor a leaf at column"


MAGNITUDES = st.floats(1e-37, 1e37)
NUMBERS = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda x: -x))
ENDS = st.one_of(st.sampled_from(sorted(LEAVES)).map(Metric), NUMBERS.map(Metric.constant))
METRICS = trees(ENDS, max_leaves=12)


def nested(depth):
    return reduce(lambda tree, _: {"data": "abs", "left": tree}, range(depth), LEAF)


@EXAMPLES
@given(METRICS)
def test_parse_reads_back_what_text_prints(metric):
    again = Metric.parse(metric.text)
    assert again == metric
    assert hash(again) == hash(metric)


@EXAMPLES
@given(METRICS)
def test_release_json_is_lossless(metric):
    through_a_file = json.loads(json.dumps(metric.to_release_json()))
    assert Metric.from_release_json(through_a_file) == metric


def test_release_json_of_the_published_metric():
    assert Metric.parse(PRUNER_ZERO).to_release_json() == PRUNER_ZERO_JSON
    assert Metric.from_release_json(PRUNER_ZERO_JSON).text == PRUNER_ZERO


def test_parse_takes_any_spacing_and_text_prints_one():
    assert Metric.parse("  mul (W,\n\tsqrt( X ))\n").text == "mul(W, sqrt(X))"


@pytest.mark.parametrize(
    ("text", "leaves", "size", "depth"),
    [("W", "W", 1, 0), (PRUNER_ZERO, "WG", 7, 3), ("add(W, neg(neg(neg(X))))", "WX", 6, 4)],
)
def test_leaves_size_and_depth(text, leaves, size, depth):
    metric = Metric.parse(text)
    assert (metric.leaves, metric.size, metric.depth) == (frozenset(leaves), size, depth)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("2", (False, False)),
        ("mul(X, B)", (True, True)),
        # As in the release, div spreads its left operand over the sides of its divisor.
        ("div(X, W)", (False, True)),
        ("add(div(X, G), G)", (True, True)),
        ("quot(colsum(W), rowsum(W))", (True, True)),
    ],
)
def test_shape_is_the_sides_along_which_a_score_can_vary(text, shape):
    metric = Metric.parse(text)
    assert metric.shape == shape
    assert (metric.problem == "") is (shape == (True, True))


@pytest.mark.filterwarnings("ignore:std")
@EXAMPLES
@given(METRICS)
def test_shape_agrees_with_the_scores_tensor(metric):
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: torch.rand(3 if leaf.shape[0] else 1, 5 if leaf.shape[1] else 1, generator=generator)
        for name, leaf in LEAVES.items()
    }
    scores = metric.score(**leaves)
    divides = any(node.name in ("div", "divrms") for node in metric.nodes())
    for side, (length, varies) in enumerate(zip((3, 5), metric.shape, strict=True)):
        if not divides:
            assert scores.shape[side] == (length if varies else 1)
        spread = scores.select(side, 0).unsqueeze(side).expand_as(scores)
        assert varies or torch.equal(scores.nan_to_num(), spread.nan_to_num())


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("div(X, W)", "every row the same scores"),
        ("mul(X, V)", "every row the same scores"),
        ("rowsum(W)", "every input of a row the same score"),
        ("0.5", "all weights one score"),
    ],
)
def test_check_scores_weights_refuses_a_score_that_does_not_vary(text, same):
    assert refusal(Metric.check_scores_weights, Metric.parse(text)) == (
        f"metric '{text}' gives {same}: a metric must vary from row to row and from input to "
        "input; for example mul(W, sqrt(X))"
    )


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ("rowsum(B)", "rowsum goes over the inputs, and its operand is the same for all of them"),
        ("colmax(1)", "colmax goes over the outputs, and its operand is the same for all of them"),
        ("zsn(rowsum(X))", "zsn scales over a matrix, and its operand is a number"),
        ("div(W, 2)", "div divides by a norm: use quot or mul for a number"),
    ],
)
def test_check_scores_weights_refuses_an_operator_that_means_nothing_on_its_operand(part, why):
    assert refusal(Metric.check_scores_weights, Metric.parse(f"mul(W, {part})")) == (
        f"metric 'mul(W, {part})' has {part}: {why}; "
        "for example quot(W, rowsum(W)), mul(0.5, mms(G))"
    )


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        *(("0.50", "0.5"), (".5", "0.5"), ("5.", "5"), ("007.0", "7"), ("-2e-3", "-0.002")),
        *(("1000000", "1e+06"), ("1E6", "1e+06"), ("-0.0", "0"), ("0.1", "0.1")),
        ("0.333333333333", "0.33333334"),
    ],
)
def test_number_is_printed_as_short_as_fp32_allows(written, printed):
    metric = Metric.parse(f"add(W, {written})")
    assert metric.text == f"add(W, {printed})"
    assert Metric.from_release_json({"data": written}).text == printed
    number = metric.operands[1]
    assert number.is_constant and number.value == pytest.approx(float(written))
    assert metric.leaves == {"W"}


@EXAMPLES
@given(NUMBERS)
def test_number_keeps_its_fp32_value_through_its_text(value):
    written = Metric.constant(value)
    assert torch.equal(written.score(), torch.tensor([[value]]))
    assert Metric.constant(written.value) == Metric.parse(written.text) == written


@pytest.mark.parametrize("written", ["1e39", "-1e999", "1e-38", "4" * 400])
def test_number_that_fp32_does_not_hold_is_refused(written):
    expected = (
        f"has the number {float(written):.6g}: its magnitude must be 0 or from 1e-37 to 1e+38"
    )
    assert expected in refusal(Metric.parse, f"mul(W, {written})")
    assert f"tree.left {expected}" in refusal(
        Metric.from_release_json, {"data": "abs", "left": {"data": written}}
    )


@pytest.mark.parametrize("name", ["nan", "inf", "-inf", "Infinity", "1_0", " 1", "0x1", "1e", "١"])
def test_number_that_float_reads_and_the_language_does_not_is_refused(name):
    message = refusal(Metric.from_release_json, {"data": name})
    assert message.startswith(f"metric file: tree has the unknown operator or leaf {name!r}")


def test_score_is_computed_in_fp32_from_bf16_with_numbers_too():
    W = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    scores = Metric.parse("mul(-0.5, mul(W, W))").score(W=W)
    # 1.0078125 squared needs 15 bits; in bf16 it would round to 1.015625.
    assert (scores.dtype, scores.tolist()) == (torch.float32, [[-0.5, -0.507843017578125]])


@pytest.mark.parametrize("leaf", ["W", "G", "X"])
def test_score_names_the_leaf_that_is_missing(leaf):
    given = {"W": torch.ones(2, 2), "G": torch.ones(2, 2), "X": torch.ones(1, 2)} | {leaf: None}
    with pytest.raises(ValueError, match=rf"uses {leaf}, and {leaf} is None: pass it$"):
        Metric.parse("add(add(W, G), X)").score(**given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mul(W, srt(X))", f"has the unknown operator 'srt' at column 8; {GUESS}"),
        ("W(G)", f"has the unknown operator 'W' at column 1; {VOCABULARY}"),
        ("mul(W, nan)", f"has the unknown leaf 'nan' at column 8; {VOCABULARY}"),
        ("add(W, abs(W, G))", "gives abs 2 operand(s), and it takes 1 at column 8"),
        ("torch.abs(W)", f"has '.' at column 6; {CALLS}"),
        ("abs(x=W)", f"has '=' at column 6; {CALLS}"),
        ("W[0]", f"has '[' at column 2; {CALLS}"),
        ("'W'", f'has "\'" at column 1; {CALLS}'),
        ("W\0", f"has '\\x00' at column 2; {CALLS}"),
        ("mul(W, +2)", f"has '+' at column 8; {CALLS}"),
        ("W -2", f"{NEITHER} 1; {VOCABULARY}"),
        ("W**2 * (X**0.5 + 0.1*G) / 3", f"has '*' at column 2; {CALLS}"),
        ("2(W)", f"{NEITHER} 1; {VOCABULARY}"),
        ("(W, G)", f"{NEITHER} 1; {VOCABULARY}"),
        ("W if G else X", f"{NEITHER} 1; {VOCABULARY}"),
        ("W G", "is not a well-formed formula at column 3"),
        ("mul(W, G", "is not a well-formed formula at column 4"),
    ],
)
def test_parse_refuses(text, message):
    assert refusal(Metric.parse, text) == f"metric '{text}' {message}"


def test_parse_refuses_what_is_empty_or_long():
    empty = "metric '' is empty: write a formula such as mul(W, sqrt(X))"
    assert refusal(Metric.parse, " \n\t") == empty
    digits = f"metric '{'9' * 31}...' is not a well-formed formula at column 1"
    assert refusal(Metric.parse, "9" * 5000) == digits
    # Quickly, since it is not looked into.
    message = f"metric '{'(' * 40}...' has 10000000 characters: at most {MAX_CHARACTERS} are read"
    assert refusal(Metric.parse, "(" * 10_000_000) == message


def test_parse_error_is_one_line_and_counts_columns_over_lines_and_leading_space():
    assert refusal(Metric.parse, "  mul(W,\n\n    Y)") == (
        f"metric 'mul(W, Y)' has the unknown leaf 'Y' at column 8; {VOCABULARY}"
    )


def test_parse_error_shows_the_neighbourhood_of_a_far_place():
    text = "add(" * 20 + "W" + ", G)" * 20
    message = refusal(Metric.parse, text.replace("W", "Q"))
    assert message == (
        "metric '...(add(add(add(add(add(add(add(Q, G), G), G), G), G), G), G),...' "
        f"has the unknown leaf 'Q' at column 81; {VOCABULARY}"
    )


@pytest.mark.parametrize("text", ["not " * 4900 + "W", "W" + "(W)" * 6000])
def test_parse_refuses_nesting_without_nested_brackets(text):
    # How deep Python's own parser goes depends on its version.
    message = refusal(Metric.parse, text)
    assert "...' is deeper than the parser goes at column 1" in message or NEITHER in message


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"data": "mul", "left": LEAF, "right": {"data": "sqt", "left": LEAF}},
            f".right has the unknown operator or leaf 'sqt'; {GUESS}",
        ),
        ({"data": "mul", "left": LEAF}, " gives mul 1 operand(s), and it takes 2"),
        (
            {"data": "abs", "right": LEAF},
            " gives abs a right operand only: a unary node has 'left'",
        ),
        ({"data": "W", "left": LEAF}, " gives the leaf W an operand: a leaf has none"),
        (
            LEAF | {"k" * 10**6: 0},
            f" has the unknown key '{'k' * 40}': a node has data, left and right",
        ),
    ],
)
def test_from_release_json_refuses(tree, message):
    assert refusal(Metric.from_release_json, tree) == f"metric file: tree{message}"


@pytest.mark.parametrize("node", [None, [], "W", {}, {"data": 1}, {"left": {"data": "W"}}])
def test_from_release_json_refuses_what_is_not_a_node(node):
    assert refusal(Metric.from_release_json, {"data": "abs", "left": node}) == (
        'metric file: tree.left is not a node: write {"data": name, "left": {...}, "right": {...}}'
    )


def test_text_and_json_are_read_down_to_the_depth_limit_and_no_deeper():
    assert Metric.parse("abs(" * MAX_DEPTH + "W" + ")" * MAX_DEPTH).depth == MAX_DEPTH
    message = refusal(Metric.parse, "abs(" * 33 + "W" + ")" * 33)
    assert message.endswith("is deeper than 32 levels at column 132")
    assert Metric.from_release_json(nested(MAX_DEPTH)).depth == MAX_DEPTH
    message = refusal(Metric.from_release_json, nested(900))
    assert message == f"metric file: tree{'.left' * 33} is deeper than 32 levels"


@pytest.mark.parametrize("group", GROUPS)
def test_criterion_reads_metric_and_group(group):
    criterion = Criterion.parse(TEXT, group)
    assert (criterion.metric, criterion.group) == (Metric.parse(TEXT), group)
    assert (criterion.text, str(criterion)) == (TEXT, f"{group}:{TEXT}")


@pytest.mark.parametrize(
    ("text", "group", "message"),
    [
        ("W", "column", "group must be one of row, layer, model, got 'column'"),
        ("W", "2:4", "group must be one of row, layer, model, got '2:4'"),
        ("X", "row", "metric 'X' gives every row the same scores: "),
        ("mul(W, colsum(X))", "row", "metric 'mul(W, colsum(X))' has colsum(X): "),
    ],
)
def test_criterion_refuses_an_unknown_group_and_a_metric_that_cannot_rank(text, group, message):
    assert refusal(Criterion.parse, text, group).startswith(message)


def test_criterion_comes_back_from_another_process():
    criteria = {named.criterion for named in NAMED.values()}
    criteria |= {Criterion(Metric.parse(text), "row") for text in ("1e+30", "mul(W, -0.1)", TEXT)}
    assert pickle.loads(pickle.dumps(criteria)) == criteria


def test_metric_crosses_as_its_text_alone_whatever_is_cached():
    fresh = pickle.dumps(Metric.parse(TEXT))
    used = Metric.parse(TEXT)
    assert used.size == 8 and used.leaves == {"W", "G", "X"} and not used.problem
    used.score(W=torch.ones(2, 2), G=torch.ones(2, 2), X=torch.ones(1, 2))
    assert TEXT.encode() in fresh
    assert pickle.dumps(used) == fresh
    assert len(fresh) < len(TEXT) + 100
