import json

import pytest

from pruning.json_file import MOST_BYTES
from pruning.metric import Metric
from pruning.metric_file import resolve_metric

PUBLISHED = "mul(abs(mul(W, W)), mms(G))"


def refusal(argument) -> str:
    with pytest.raises(ValueError) as caught:
        resolve_metric(str(argument))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def best_metric(tmp_path, **changes):
    content = {"schema": 1, "metric": "mul(W, G)", "group": "model", "fitness": 3.2}
    content["tree"] = Metric.parse("mul(W, G)").to_release_json()
    path = tmp_path / "best_metric.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


def test_resolve_metric_takes_a_baseline_with_its_own_group():
    resolved = resolve_metric("snip")
    assert (resolved.criterion.text, resolved.criterion.group) == ("mul(W, G)", "model")
    assert resolved.source == "baseline snip"


def test_resolve_metric_takes_a_formula_and_compares_it_per_row():
    resolved = resolve_metric(PUBLISHED)
    assert (resolved.criterion.text, resolved.criterion.group) == (PUBLISHED, "row")
    assert resolved.source == "formula"


def test_resolve_metric_takes_a_number_in_a_formula():
    assert resolve_metric("mul(W, add(mul(0.50, G), sqrt(X)))").criterion.text == (
        "mul(W, add(mul(0.5, G), sqrt(X)))"
    )


def test_resolve_metric_takes_a_formula_longer_than_a_file_name_may_be():
    text = "add(W, " * 30 + "G" + ")" * 30
    text = f"mul({text}, {text})"
    assert len(text) > 255
    assert resolve_metric(text).criterion.text == text


def test_resolve_metric_reads_what_a_search_writes(tmp_path):
    resolved = resolve_metric(str(best_metric(tmp_path)))
    assert (resolved.criterion.text, resolved.criterion.group) == ("mul(W, G)", "model")
    assert resolved.source == "file best_metric.json"


def test_resolve_metric_reads_the_bare_tree_of_the_release(tmp_path):
    path = tmp_path / "best_tree.json"
    path.write_text(json.dumps(Metric.parse(PUBLISHED).to_release_json()), encoding="utf-8")
    resolved = resolve_metric(str(path))
    assert (resolved.criterion.text, resolved.criterion.group) == (PUBLISHED, "row")


def test_resolve_metric_reads_a_formula_from_a_text_file(tmp_path):
    path = tmp_path / "metric.txt"
    path.write_text("mul(W,\n    sqrt(X))\n", encoding="utf-8")
    assert resolve_metric(str(path)).criterion.text == "mul(W, sqrt(X))"


def test_resolve_metric_reads_a_group_that_is_null_as_per_row(tmp_path):
    assert resolve_metric(str(best_metric(tmp_path, group=None))).criterion.group == "row"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("wnada", "metric 'wnada' is no known name: did you mean wanda? or give one of magnitude"),
        ("runs/7/best_metric.json", "looks like a file and there is no such file: give one of"),
        ("best.txt", "metric 'best.txt' looks like a file and there is no such file"),
        ("~/best", "looks like a file and there is no such file"),
        ("W/X", "metric 'W/X' is written infix: write quot(W, X)"),
        ("Pruner_Zero", "is no known name: did you mean pruner-zero? or give one of magnitude"),
        ("runs/7", "metric 'runs/7' looks like a file and there is no such file"),
        ("mul(W, 1e99)", "metric 'mul(W, 1e99)' has the number 1e+99"),
        ("0.5", "gives all weights one score"),
        ("mul(W, Y)", "has the unknown leaf 'Y'"),
        ("sqrt(X)", "metric 'sqrt(X)' gives every row the same scores"),
        ("X", "gives every row the same scores"),
        ("", "metric '' is empty"),
        ("a/\0", "looks like a file and there is no such file"),
    ],
)
def test_resolve_metric_names_what_is_wrong_with_an_argument(argument, message):
    assert message in refusal(argument)


def test_resolve_metric_reads_the_folder_of_a_run(tmp_path):
    assert resolve_metric(str(best_metric(tmp_path).parent)) == resolve_metric(
        str(tmp_path / "best_metric.json")
    )


def test_resolve_metric_reads_the_folder_of_a_pruned_model(tmp_path):
    best_metric(tmp_path).rename(tmp_path / "pruning_recipe.json")
    assert resolve_metric(str(tmp_path)).criterion.text == "mul(W, G)"


def test_resolve_metric_says_what_another_folder_lacks(tmp_path):
    assert refusal(tmp_path).startswith(
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
    assert message in refusal(best_metric(tmp_path, **changes))


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
    assert message in refusal(path)


def test_resolve_metric_refuses_a_tree_deeper_than_the_language(tmp_path):
    tree = {"data": "W"}
    for _ in range(50):
        tree = {"data": "abs", "left": tree}
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert "is deeper than 32 levels" in refusal(path)
