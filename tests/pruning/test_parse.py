"""What `--metric` may be: a name, a formula, a file or a folder; and what is refused."""

import json

import pytest
from refusals import refusal

from prunevolve.pruning.json_file import MOST_BYTES
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import read_metric, resolve_metric

PUBLISHED = "mul(abs(mul(W, W)), mms(G))"
DEEP = "add(W, " * 30 + "G" + ")" * 30
LONG = f"mul({DEEP}, {DEEP})"  # longer than the name of a file may be


def best_metric(tmp_path, **changes):
    content = {"schema": 1, "metric": "mul(W, G)", "group": "model", "fitness": 3.2}
    content["tree"] = Metric.parse("mul(W, G)").to_release_json()
    path = tmp_path / "best_metric.json"
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("argument", "criterion"),
    [
        ("snip", "model:mul(W, G)"),
        ("sparsegpt", "layer:quot(sqr(W), H)"),
        ("mul(W, mul(0.50, G))", "row:mul(W, mul(0.5, G))"),
        (LONG, f"row:{LONG}"),
        ("W", "row:W"),
        ("W / G", "row:quot(W, G)"),
        ("W^2 * G", "row:mul(sqr(W), G)"),
    ],
)
def test_resolve_metric_takes_a_name_with_its_group_and_a_formula(argument, criterion):
    found, found_on = resolve_metric(argument)
    assert (str(found), found_on) == (criterion, "")


@pytest.mark.parametrize("name", ["best_metric.json", "pruning_recipe.json"])
def test_resolve_metric_reads_what_a_search_or_a_pruning_writes_or_its_folder(tmp_path, name):
    found = {"tasks": [{"name": "embedded 60%"}, {"name": "b 2:4"}]}
    path = best_metric(tmp_path, provenance=found).rename(tmp_path / name)
    expected = (read_metric("snip"), "embedded 60%, b 2:4")
    assert resolve_metric(str(path)) == resolve_metric(str(tmp_path)) == expected


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(Metric.parse(PUBLISHED).to_release_json()),
        PUBLISHED.replace(" ", "\n  "),
        json.dumps({"metric": PUBLISHED, "group": None}),
    ],
)
def test_resolve_metric_reads_a_tree_of_the_release_or_a_formula_in_a_file(tmp_path, content):
    path = tmp_path / "metric"
    path.write_text(content, encoding="utf-8")
    assert read_metric(str(path)) == read_metric(PUBLISHED)


def test_resolve_metric_takes_a_row_of_a_runs_hall_of_fame_by_its_name(tmp_path):
    table = tmp_path / "hall_of_fame.csv"
    table.write_text('name,size,group,metric\n7-1,3,model,"mul(W, G)"\n12,1,layer,W\n')
    assert str(read_metric(f"{tmp_path}:7-1")) == "model:mul(W, G)"
    assert resolve_metric(f"{tmp_path}/:12")[0] == Criterion.parse("W", "layer")
    expected = f"metric '7-2' is not in {table}: give one of 7-1, 12"
    assert refusal(resolve_metric, f"{tmp_path}:7-2") == expected
    table.unlink()
    assert "is no known name or file" in refusal(resolve_metric, f"{tmp_path}:7-1")


@pytest.mark.parametrize(("given", "near"), [("wnada", "wanda"), ("sparse-gpt", "sparsegpt")])
def test_resolve_metric_offers_a_near_name(given, near):
    found = refusal(resolve_metric, given)
    assert found.startswith(f"metric {given!r} is no known name or file: did you mean {near}? or ")
    assert f", {near}, " in found


def test_resolve_metric_says_what_a_folder_lacks(tmp_path):
    problem = "is a folder without best_metric.json, which a run has once"
    found = refusal(resolve_metric, str(tmp_path))
    assert found.startswith(f"metric {str(tmp_path)!r} {problem}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"group": ["row"]}, "group must be one of row, layer, model, outputs, got ['row']"),
        ({"schema": 2}, "schema must be 1, it is from another version"),
        ({"metric": 5, "tree": None}, "it has neither a string 'metric' nor a tree's 'data'"),
        ({"metric": "mul(W, X)"}, "'metric' and 'tree' differ"),
        (b'{"data": ' * 200_000, "is no JSON, or nested too deeply"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
        (b" " * (MOST_BYTES + 1), f"is longer than {MOST_BYTES} bytes: not read"),
    ],
)
def test_resolve_metric_names_what_is_wrong_in_a_file(tmp_path, content, message):
    path = best_metric(tmp_path, **content if isinstance(content, dict) else {})
    if isinstance(content, bytes):
        path.write_bytes(content)
    assert message in refusal(resolve_metric, str(path))
