"""A metric with its comparison group: read from text, told as text, sent as text."""

import pickle

import pytest
import torch
from refusals import refusal

from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.masks import GROUPS
from pruning.metric import Metric

TEXT = "mul(W, add(mul(0.5, G), sqrt(X)))"


@pytest.mark.parametrize("group", GROUPS)
def test_parse_reads_metric_and_group(group):
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
def test_parse_refuses_an_unknown_group_and_a_metric_that_cannot_rank(text, group, message):
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
