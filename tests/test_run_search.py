"""A whole search on the embedded model, in this process: its files, its table, its exit codes."""

import json
import re
import shutil
import sys

import pytest

import run_search
from pruning.baselines import BASELINES
from pruning.metric import Metric
from pruning.metric_file import resolve_metric

SMALL = [
    *("ray.workers=0", "search.candidates=16", "search.population=6", "search.stages=[1]"),
    *("fitness.windows=3", "fitness.length=32", "calibration.windows=2", "calibration.length=32"),
    *("selection.windows=3", "selection.length=32", "report.windows=3", "report.length=32"),
]


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_search.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_search.main()
    return stop.value.code, capsys.readouterr()


def settings(*more):
    return [f"--set={setting}" for setting in [*SMALL, *more]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["run_search.py", "--out", str(out), *settings()])
        run_search.main()
    assert stop.value.code == 0
    return out


def read(path):
    return json.loads(path.read_text())


def test_journal_has_one_line_a_candidate_with_the_agreed_keys(finished):
    lines = [json.loads(line) for line in (finished / "journal.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(16))
    for line in lines:
        assert list(line) == [
            *("index", "metric", "group", "outcome", "fitness", "fingerprint", "tokens"),
            *("parents", "reason"),
        ]
        assert (line["fitness"] is None) == (line["outcome"] != "evaluated")


def test_best_metric_is_one_of_the_evaluated_and_can_be_applied(finished):
    best = read(finished / "best_metric.json")
    assert set(best) == {
        *("schema", "metric", "tree", "group", "leaves", "fitness", "size", "provenance"),
    }
    assert Metric.from_release_json(best["tree"]).text == best["metric"]
    resolved = resolve_metric(str(finished / "best_metric.json"))
    assert (resolved.metric.text, resolved.group) == (best["metric"], "model")


def test_summary_measures_dense_baselines_and_best(finished):
    summary = read(finished / "summary.json")
    assert set(summary["baselines"]) == set(BASELINES)
    assert set(summary["best"]) >= {"metric", "perplexity", "fitness"}
    assert summary["dense"] < summary["best"]["perplexity"]
    assert sum(summary["outcomes"].values()) == summary["candidates"] == 16
    assert summary["seconds"] > 0


def test_the_winner_is_the_best_on_the_selection_text(finished):
    summary = read(finished / "summary.json")
    losses = [one["selection_loss"] for one in summary["selection"]]
    assert losses == sorted(losses)
    assert summary["selection"][0]["metric"] == summary["best"]["metric"]
    assert summary["selection"][0]["difference"] == 0


def test_report_is_one_file_that_asks_for_nothing(finished):
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<(script|link|img|iframe)\b|src=|@import", page)
    assert read(finished / "summary.json")["best"]["metric"] in page


def test_report_can_be_rebuilt(finished, monkeypatch, capsys):
    (finished / "report.html").unlink()
    code, _ = call(monkeypatch, capsys, "--report", finished)
    assert code == 0
    assert (finished / "report.html").exists()


def test_the_end_table_and_the_apply_line_are_printed(tmp_path, monkeypatch, capsys):
    code, printed = call(monkeypatch, capsys, "--out", tmp_path / "run", *settings())
    assert code == 0
    assert "perplexity at 60% unstructured on embedded report: 3 windows of 32" in printed.out
    assert f"--metric {tmp_path / 'run' / 'best_metric.json'} --sparsity 0.6" in printed.out
    for name in ("dense", "best found", *BASELINES):
        assert f"│ {name} " in printed.out


def test_a_finished_run_can_be_extended(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (finished / "journal.jsonl").read_bytes()
    longer = ("--resume", tmp_path / "run", "--set", "search.candidates=18")
    code, _ = call(monkeypatch, capsys, *longer)
    after = (tmp_path / "run" / "journal.jsonl").read_bytes()
    assert code == 0
    assert after.startswith(before)
    assert len(after.splitlines()) == 18


def test_a_resume_with_other_statistics_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, capsys, "--out", out, *settings())[0] == 0
    environment = read(out / "environment.json")
    environment["fingerprints"]["statistics"] = "another"
    (out / "environment.json").write_text(json.dumps(environment))
    code, printed = call(monkeypatch, capsys, "--resume", out)
    assert code == 4
    assert printed.err.startswith("error: the run's statistics had fingerprint another and has ")


def test_a_search_in_which_nothing_was_evaluated_exits_5(tmp_path, monkeypatch, capsys):
    hopeless = settings("search.hopeless=1e-9", "search.candidates=4")
    code, printed = call(monkeypatch, capsys, "--out", tmp_path / "run", *hopeless)
    assert code == 5
    assert "error: no candidate was evaluated to the end; breed more: " in printed.out


def test_n_of_m_patterns_are_searched(tmp_path, monkeypatch, capsys):
    pattern = settings("pruning.pattern=2:4", "search.candidates=6")
    code, printed = call(monkeypatch, capsys, "--out", tmp_path / "run", *pattern)
    assert code == 0
    assert "perplexity at 2:4 on embedded report" in printed.out
    assert "--pattern 2:4" in printed.out


def test_extended_primitives_collect_their_statistics_and_breed_from_them(
    tmp_path, monkeypatch, capsys
):
    more = ("search.primitives=extended", "search.seeds=[ria, 'mul(W, add(A, mul(0.5, B)))', wifv]")
    code, printed = call(monkeypatch, capsys, "--out", tmp_path / "run", *settings(*more))
    assert code == 0, printed.err
    assert "collecting A, B, G, V, X on 64 tokens" in printed.out
    lines = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines[:3]] == ["evaluated"] * 3
    named = set().union(*(Metric.parse(line["metric"]).leaves for line in lines))
    assert named & {"A", "V", "B"}
    assert not any("is None: pass it" in line["reason"] for line in lines)


def test_release_primitives_collect_what_a_seed_names_beside_x_and_g(tmp_path, monkeypatch, capsys):
    more = ("search.seeds=[wifv]", "search.candidates=3", "search.population=2")
    code, printed = call(monkeypatch, capsys, "--out", tmp_path / "run", *settings(*more))
    assert code == 0, printed.err
    assert "collecting G, V, X on 64 tokens" in printed.out
