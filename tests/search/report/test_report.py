"""report.html and its chart, and the tables at the end of a run: what they show of its files."""

import shlex
from base64 import b64encode
from contextlib import closing

import pytest
from report_run import records_of, summary_of, task_of, write_run
from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.pruning.run.options import Request, make
from prunevolve.search.next_steps import commands_of, options_of
from prunevolve.search.report.charts import fitness_chart
from prunevolve.search.report.report import factor_table, front_table, measured_tables
from prunevolve.search.results import write_report
from prunevolve.search.run_folder import FolderError, RunFolder


def page_of(folder):
    write_report(folder)
    return (folder.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two tasks; the name of the second is HTML."""
    records = records_of(120)
    hostile = task_of(name="<script>alert(1)</script>", pattern="2:4", best={"perplexity": 40.0})
    hostile["behind_best"]["wanda"] = {"nats": -0.13, "standard_error": 0.02}
    summary = summary_of(records, tasks=[task_of(), hostile])
    with closing(write_run(tmp_path_factory.mktemp("report") / "run", records, summary)) as folder:
        yield folder


@pytest.fixture(scope="module")
def html(run):
    return page_of(run)


def test_page_says_what_came_of_the_search_in_numbers(run, html):
    for text in (
        '<p class="verdict worse">Compared with the best of the 2 baselines',
        "<td>35.00</td>",
        '<p class="formula">W · (G + W²)</p>',
        "<code>mul(W, add(G, sqr(W)))</code>",
        "crowding: 0.01",  # a key of the config
        f"--metric {run.path / 'best_metric.json'}",
    ):
        assert text in " ".join(html.split())


@pytest.mark.parametrize(("bos", "flag"), [(True, "--bos"), (False, "--no-bos"), (None, None)])
def test_command_of_the_next_step_has_the_runs_bos(tmp_path, bos, flag):
    folder = RunFolder(tmp_path / "run")
    config = schema.load(None, [f"calibration.bos={str(bos).lower()}"] if flag else [])
    words = shlex.split(commands_of(folder, config)[0])
    assert [word for word in words if "bos" in word] == ([flag] if flag else [])
    options = make(Request, {**options_of(folder, config), "out": "out"}, "options")
    assert options.bos is bos
    assert f"{folder.path}/best_metric.json" in words


def test_page_of_an_unfinished_run_says_so_and_shows_its_journal(tmp_path):
    with closing(write_run(tmp_path / "run", records_of(30))) as folder:
        html = page_of(folder)
    assert "This run has not ended: the report shows its first 30\ncandidates." in html


def test_report_with_a_damaged_summary_is_refused(tmp_path):
    with closing(write_run(tmp_path / "run", records_of(12))) as folder:
        folder.write_json("summary.json", {"tasks": [], "best": {}})
        with pytest.raises(FolderError, match=r"summary\.json lacks factors, selection"):
            write_report(folder)


def test_page_and_chart_are_the_same_each_time(run, html):
    chart = (run.path / "fitness.svg").read_bytes()
    assert page_of(run) == html
    assert (run.path / "fitness.svg").read_bytes() == chart
    assert b64encode(chart).decode() in html


def test_page_escapes_what_comes_from_files(html):
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_chart_of_six_hundred_candidates_is_below_100_kilobytes_without_a_date():
    evaluated = [record_of(index, "W", 1.1 + (index * 37 % 100) / 200) for index in range(600)]
    chart = fitness_chart(evaluated, 24)
    assert len(chart.encode()) < 100_000
    assert "<dc:date>" not in chart


def test_task_table_has_dense_first_then_the_best():
    table, *_ = measured_tables(summary_of(records_of(12)))
    assert table.rows == [
        ("dense", "25.00", "", "", ""),
        ("best found", "30.00", "", "row", "W · (G + W²)"),
        ("wanda", "35.00", "+0.1500 ± 0.0100", "row", "W · √X"),
        ("snip", "50.00", "+0.5000", "model", "W · G"),
    ]


def test_front_has_the_baselines_that_no_smaller_metric_is_as_fit_as():
    found = [record_of(0, "mul(W, G)", 0.9), record_of(1, "mul(W, add(G, sqr(W)))", 0.5)]
    table = front_table(found, {"magnitude": 3.0, "wanda": 0.8, "snip": 2.0})
    assert [row[:3] for row in table.rows] == [
        *(("1", "3.0000", "magnitude"), ("3", "0.9000", "0")),
        *(("4", "0.8000", "wanda"), ("6", "0.5000", "1")),
    ]


def test_factor_table_begins_with_the_factor_that_the_winner_cannot_do_without():
    table = factor_table(summary_of(records_of(6))["factors"])
    assert table.rows == [("cannot prune", "left out", "W"), ("+0.2500 ± 0.0100", "", "G + W²")]
