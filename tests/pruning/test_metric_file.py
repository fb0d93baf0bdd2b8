import json

import pytest
from refusals import refusal

from prunevolve.pruning.json_file import MOST_BYTES
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.metric_file import resolve_metric

PUBLISHED = "mul(abs(mul(W, W)), mms(G))"


def best_metric(tmp_path, **changes):
    content = {"schema": 1, "metric": "mul(W, G)", "group": "model", "fitness": 3.2}
    content["tree"] = Metric.parse("mul(W, G)").to_release_json()
    path = tmp_path / "best_metric.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


DEEP = "add(W, " * 30 + "G" + ")" * 30
LONG = f"mul({DEEP}, {DEEP})"  # longer than the name of a file may be


@pytest.mark.parametrize(
    ("argument", "text", "group", "source"),
    [
        ("snip", "mul(W, G)", "model", "baseline snip"),
        (PUBLISHED, PUBLISHED, "row", "formula"),
        ("mul(W, mul(0.50, G))", "mul(W, mul(0.5, G))", "row", "formula"),
        (LONG, LONG, "row", "formula"),
    ],
    ids=["baseline", "formula", "number", "long"],
)
def test_resolve_metric_takes_a_name_with_its_group_and_a_formula(argument, text, group, source):
    resolved = resolve_metric(argument)
    assert (resolved.criterion.text, resolved.criterion.group) == (text, group)
    assert resolved.source == source


@pytest.mark.parametrize("name", ["best_metric.json", "pruning_recipe.json"])
def test_resolve_metric_reads_what_a_search_or_a_pruning_writes_or_its_folder(tmp_path, name):
    path = best_metric(tmp_path).rename(tmp_path / name)
    resolved = resolve_metric(str(path))
    assert (resolved.criterion.text, resolved.criterion.group) == ("mul(W, G)", "model")
    assert resolved.source == f"file {name}"
    assert resolve_metric(str(tmp_path)) == resolved


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best_tree.json", json.dumps(Metric.parse(PUBLISHED).to_release_json())),
        ("metric.txt", PUBLISHED.replace(" ", "\n  ")),
        ("metric.json", json.dumps({"metric": PUBLISHED, "group": None})),
    ],
)
def test_resolve_metric_reads_a_tree_of_the_release_or_a_formula_in_a_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    resolved = resolve_metric(str(path))
    assert (resolved.criterion.text, resolved.criterion.group) == (PUBLISHED, "row")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("wnada", "metric 'wnada' is no known name: did you mean wanda? or give one of magnitude"),
        ("Pruner_Zero", "is no known name: did you mean pruner-zero? or give one of magnitude"),
        ("runs/7/best_metric.json", "looks like a file and there is no such file: give one of"),
        ("best.txt", "metric 'best.txt' looks like a file and there is no such file"),
        ("~/best", "looks like a file and there is no such file"),
        ("a/\0", "looks like a file and there is no such file"),
        (
            "W/X",
            "metric 'W/X' has '/' at column 2; a formula is nested calls, such as mul(W, sqrt(X))",
        ),
        ("X", "gives every row the same scores"),
        ("", "metric '' is empty"),
    ],
)
def test_resolve_metric_names_what_is_wrong_with_an_argument(argument, message):
    assert message in refusal(resolve_metric, argument)


def test_resolve_metric_says_what_another_folder_lacks(tmp_path):
    assert refusal(resolve_metric, str(tmp_path)).startswith(
        f"metric {str(tmp_path)!r} is a folder without best_metric.json, which a search writes at "
        "its end: give one of magnitude"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "column"}, "group must be one of row, layer, model, got 'column'"),
        ({"group": ["row"]}, "group must be one of row, layer, model, got ['row']"),
        ({"schema": 2}, "schema must be 1, got 2: it is from another version"),
        ({"metric": 5}, "it has neither a string 'metric' nor a tree's 'data'"),
        ({"metric": "mul(W, X)"}, "'metric' and 'tree' differ"),
        ({"tree": {"data": "mul"}}, "gives mul 0 operand(s), and it takes 2"),
        ({"metric": "sqrt(X)", "tree": {"data": "sqrt", "left": {"data": "X"}}}, "same scores"),
    ],
)
def test_resolve_metric_names_what_is_wrong_in_a_file(tmp_path, changes, message):
    assert message in refusal(resolve_metric, str(best_metric(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"metric": ', "is no JSON"),
        (b'{"data": ' * 200_000, "is nested too deeply"),
        (b"\xff\xfe", "must be UTF-8 text"),
        (b" " * (MOST_BYTES + 1), f"is longer than {MOST_BYTES} bytes: not read"),
        (b'{"metric": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b"", "metric '' is empty"),
    ],
)
def test_resolve_metric_refuses_a_hostile_file(tmp_path, content, message):
    path = tmp_path / "best_metric.json"
    path.write_bytes(content)
    assert message in refusal(resolve_metric, str(path))
