"""report.html and its chart, and the tables at the end of a run: what they show of its files."""

import shlex
from base64 import b64encode
from contextlib import closing

import pytest
from report_run import records_of, summary_of, task_of, write_run
from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.search.charts import fitness_chart, path_chart
from prunevolve.search.report import (
    about_winner,
    finalist_table,
    front_table,
    measured_tables,
    path_table,
)
from prunevolve.search.results import commands_of, rebuild_report
from prunevolve.search.run_folder import FolderError


def page_of(folder):
    rebuild_report(folder)
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
        "Candidate 119-1: 2 factors, fitness 0.9000, on the selection text 0.9500;",
        "<h2>Factors against fitness</h2>",
        '<th scope="col" class="long">left out</th>',
        "brood: 16",  # a key of the config
        f"<span>--metric</span> {run.path / 'best_metric.json'}",
    ):
        assert text in " ".join(html.split())


@pytest.mark.parametrize(("bos", "flag"), [(True, "--bos"), (False, "--no-bos"), (None, None)])
def test_command_of_the_next_step_has_the_runs_bos(tmp_path, bos, flag):
    config = schema.load(None, [f"calibration.bos={str(bos).lower()}"] if flag else [])
    words = shlex.split(commands_of(tmp_path, config)[0])
    assert [word for word in words if "bos" in word] == ([flag] if flag else [])
    assert f"{tmp_path}/best_metric.json" in words


def test_page_says_how_to_measure_what_also_changes_the_weights_that_stay(run, html):
    config = schema.load(run.path / "config.yaml", ["report.windows=5"])
    apply, _ = commands_of(run.path, config)
    # On the windows of the run's report, so that the figures can be compared.
    assert "--eval-windows 5 " in apply
    assert 'also with this metric: <a href="#apply">' in html
    _, _, rest = html.partition('<p id="apply">')
    assert "SparseGPT and other methods" in html and "--recipes" not in html
    for option in ("--update sparsegpt", "--update reconstruct", "--metric sparsegpt"):
        name, value = option.split()
        assert f"<code><span>{name}</span> {value}</code>" in rest


def test_formula_stands_once_and_tables_name_it(html):
    for formula in ("W · (G + W²)", "W · √X", "W · G"):  # the winner, and baselines of both tasks
        assert html.count(f">{formula}<") == 1
    assert html.count("<td>best found</td>") == 2
    assert html.count('<td class="long">as best found</td>') == 2  # a finalist, and on the front


def test_report_with_a_damaged_summary_is_refused(tmp_path):
    with closing(write_run(tmp_path / "run", records_of(12))) as folder:
        folder.write_json("summary.json", {"tasks": [], "best": {}})
        with pytest.raises(
            FolderError, match=r"summary\.json lacks candidates, path, selection, verdict_kind"
        ):
            rebuild_report(folder)


def test_page_and_charts_are_the_same_each_time_and_without_a_date(run, html):
    chart = (run.path / "fitness.svg").read_bytes()
    assert page_of(run) == html
    assert (run.path / "fitness.svg").read_bytes() == chart
    assert b64encode(chart).decode() in html
    path = summary_of(records_of(6))["path"]
    assert path_chart(path) == path_chart(path)
    assert "<dc:date>" not in chart.decode() + path_chart(path)


def test_page_escapes_what_comes_from_files(html):
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_chart_of_six_hundred_candidates_is_below_100_kilobytes():
    evaluated = [record_of(index, "W", 1.1 + (index * 37 % 100) / 200) for index in range(600)]
    assert len(fitness_chart(evaluated, 24).encode()) < 100_000


def test_chart_names_its_lines_and_draws_them_to_the_last_candidate():
    evaluated = [record_of(index, "W", 1.1) for index in range(50)]
    last = record_of(99, "W", None, kind="duplicate")
    assert "<!-- 100 -->" in fitness_chart([*evaluated, last], 24)
    chart = fitness_chart(evaluated, 24)
    assert "<!-- 100 -->" not in chart
    assert "<!-- median of the best 24 -->" in chart and "<!-- best so far -->" in chart


def test_task_table_has_dense_first_then_the_best():
    table, *_ = measured_tables(summary_of(records_of(12)))
    assert table.rows == [
        ("dense", "25.00", "", "", ""),
        ("best found", "30.00", "", "row", "W · (G + W²)"),
        ("wanda", "35.00", "+0.1500 ±\N{NO-BREAK SPACE}0.0100", "row", "W · √X"),
        ("snip", "50.00", "+0.5000", "model", "W · G"),
    ]


def test_front_has_the_baselines_that_no_smaller_metric_is_as_fit_as():
    found = [record_of(0, "mul(W, G)", 0.9), record_of(1, "mul(W, add(G, sqr(W)))", 0.5)]
    rows = [{"name": str(one.index), **one.described} for one in found]
    chosen = {"name": "7-1", **record_of(7, "mul(G, sqrt(X))", 0.95).described}
    named = {"magnitude": 3.0, "wanda": 0.8, "snip": 2.0}
    table = front_table([*rows, chosen], named, "7-1")
    # What was chosen need not be on the front.
    assert [row[:3] for row in table.rows] == [
        *(("magnitude", "1", "3.0000"), ("0", "3", "0.9000"), ("wanda", "4", "0.8000")),
        *(("7-1, chosen", "4", "0.9500"), ("1", "6", "0.5000")),
    ]


def test_front_has_a_candidate_once_though_it_is_a_finalist_too(tmp_path):
    records = records_of(6)
    summary = summary_of(records)
    winner = summary["selection"][0]
    summary |= {"best": {**winner, "perplexity": 30.0}, "selection": [{**winner, "chosen": True}]}
    with closing(write_run(tmp_path / "run", records, summary)) as folder:
        assert page_of(folder).count("<td>5, chosen</td>") == 2  # and among the finalists


def test_path_table_goes_from_all_factors_to_the_fewest():
    table = path_table(summary_of(records_of(6))["path"][::-1])
    assert table.about.startswith("Each row leaves out one more factor; with more than can win, ")
    assert table.columns == ("candidate", "factors", "fitness", "selection", "vs best", "left out")
    assert table.rows == [
        ("5", "3", "0.9000", "0.9500", "+0.0000 ±\N{NO-BREAK SPACE}0.0000", ""),
        ("5-1, chosen", "2", "0.9000", "0.9500", "+0.2500 ±\N{NO-BREAK SPACE}0.0100", "√X"),
    ]


def test_finalist_table_has_each_by_its_name_and_equal_formulas_in_one_row():
    first, second = summary_of(records_of(6))["selection"]
    table = finalist_table([first, second, second | {"name": "3-9", "chosen": False}])
    assert [row[:5] for row in table.rows] == [
        ("5", "3", "0.9000", "0.9500", "+0.0000 ±\N{NO-BREAK SPACE}0.0000"),
        ("5-1, chosen, 3-9", "2", "0.9000", "0.9500", "+0.2500 ±\N{NO-BREAK SPACE}0.0100"),
    ]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert table.rows[1][-2:] == ("row", "W · (G + W²)")


def test_about_winner_names_the_fittest_candidate_too():
    records = [record for record in records_of(6) if record.fitness is not None]
    best = summary_of(records)["best"]
    assert about_winner(best | {"fitness": 0.97}, records) == (
        "Candidate 5-1: 2 factors, fitness 0.9700, on the selection text 0.9500; comparison group "
        "row. The fittest candidate is 5, with 0.9000."
    )
    plain = {**best, "selection": None}
    assert about_winner(plain, records) == "Fitness 0.9000, 6 nodes, comparison group row."


def test_path_chart_shows_each_number_of_factors():
    path = summary_of(records_of(6))["path"]
    chart = path_chart(path)
    # One far off, as one without a core is, leaves the others to be seen.
    far = {**path[0], "factors": 1, "fitness": 1e6, "selection": 1e6}
    with_far = path_chart([*path, far])
    assert with_far.count("<!-- 1 -->") > chart.count("<!-- 1 -->")
    assert "<!-- 1e6 -->" not in with_far
