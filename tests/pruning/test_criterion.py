"""A metric with its comparison group: read from text, told as text, sent as text."""

import pickle

import pytest
import torch

from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.masks import GROUPS
from pruning.metric import Metric

TEXT = "mul(W, add(mul(0.5, G), sqrt(X)))"


def refusal(text: str, group: str) -> str:
    with pytest.raises(ValueError) as error:
        Criterion.parse(text, group)
    assert "\n" not in str(error.value)
    return str(error.value)


# Text


@pytest.mark.parametrize("group", GROUPS)
def test_parse_reads_metric_and_group(group):
    criterion = Criterion.parse(TEXT, group)
    assert (criterion.metric, criterion.group) == (Metric.parse(TEXT), group)
    assert (criterion.text, str(criterion)) == (TEXT, f"{group}:{TEXT}")


@pytest.mark.parametrize("group", ["column", "", "ROW", "2:4", "free"])
def test_parse_refuses_an_unknown_group(group):
    assert refusal("W", group) == f"group must be one of row, layer, model, got {group!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mul(W", "metric "),
        ("mul(W, Q)", "metric "),
        ("X", "metric 'X' gives every row the same scores: "),
        ("0.5", "metric '0.5' gives all weights one score: "),
        ("mul(W, colsum(X))", "metric 'mul(W, colsum(X))' has colsum(X): "),
    ],
)
def test_parse_refuses_a_metric_that_cannot_rank_weights(text, message):
    assert refusal(text, "row").startswith(message)


def test_criteria_are_equal_by_metric_and_group():
    criteria = [Criterion.parse(text, group) for text in ("W", "G") for group in GROUPS]
    assert len(set(criteria)) == 6
    assert Criterion.parse(" mul( W,G )", "row") == Criterion.parse("mul(W, G)", "row")


# To another process


@pytest.mark.parametrize("name", NAMED)
def test_criterion_comes_back_from_another_process(name):
    criterion = NAMED[name].criterion
    assert pickle.loads(pickle.dumps(criterion)) == criterion


@pytest.mark.parametrize("text", ["0.25", "1e+30", "-3", "mul(W, -0.1)", "X", TEXT])
def test_metric_comes_back_from_another_process(text):
    metric = Metric.parse(text)
    again = pickle.loads(pickle.dumps(metric))
    assert again == metric
    assert again.text == text


def test_metric_crosses_as_its_text_alone_whatever_is_cached():
    fresh = pickle.dumps(Metric.parse(TEXT))
    used = Metric.parse(TEXT)
    assert used.size == 8 and used.leaves == {"W", "G", "X"} and not used.problem
    used.score(W=torch.ones(2, 2), G=torch.ones(2, 2), X=torch.ones(1, 2))
    assert TEXT.encode() in fresh
    assert pickle.dumps(used) == fresh
    assert len(fresh) < len(TEXT) + 100
