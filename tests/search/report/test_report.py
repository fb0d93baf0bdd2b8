"""The tables at the end of a run and report.html: what they show of a run's files."""

import re
from contextlib import closing
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
from report_run import CONFIG, SCALE, records_of, summary_of, task_of, write_run
from toy_records import record_of

from prunevolve.search.journal import FolderError
from prunevolve.search.report import charts, page, tables
from prunevolve.search.report.page import Run, render
from prunevolve.search.results import write_report
from prunevolve.search.summary import TaskResult


class Page(HTMLParser):
    """Collects what the tests ask a page for, and checks that each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.links, self.tags = [], [], [], set()
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "xlink:href", "src"):
                self.links.append(value)
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


SECTIONS = ("best", "report", "finalists", "search", "learned", "front", "ancestry", "layers")


def page_of(folder):
    write_report(folder)
    return (folder.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two tasks; names of the second are HTML."""
    records = records_of(120)
    hostile = task_of(name="<script>alert(1)</script>", pattern="2:4", best={"perplexity": 40.0})
    hostile["layers"] = {**hostile["layers"], "<b>": hostile["layers"]["wanda"]}
    hostile["behind_best"]["wanda"] = {"nats": -0.13, "standard_error": 0.02}
    summary = summary_of(records, tasks=[task_of(), hostile])
    with closing(write_run(tmp_path_factory.mktemp("report") / "run", records, summary)) as folder:
        yield folder


@pytest.fixture(scope="module")
def html(run):
    return page_of(run)


def test_page_has_each_section_and_chart(html):
    for section in SECTIONS:
        assert f'<h2 id="{section}">' in html
        assert f'href="#{section}"' in html
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert titles == [
        *["Perplexity on the test text"] * 2,
        "Fitness against candidates bred",
        "Outcomes",
        "Fitness against size",
        *[
            "Zeros, by block",
            "Zeros, by kind of matrix",
            "Zeros of the best found, layer by layer",
            "Mask overlap with the best found, by block",
            "Mask overlap with the best found, by kind of matrix",
        ]
        * 2,
    ]


def test_page_says_on_top_what_was_searched_and_what_came_of_it(html):
    title = "Search for a pruning metric: embedded 60%, embedded 2:4"
    assert f"<h1>{title}</h1>" in html
    assert f"<title>{title}</title>" in html
    verdict = html.index('<p class="verdict worse"')
    assert verdict < html.index('<nav aria-label="Sections">')
    assert "better on 1 of 2 tasks" in html[verdict : verdict + 400]
    assert "Beats wanda, the best named metric on the report text: perplexity 30.00" in html


def test_page_shows_where_the_run_comes_from(run, html):
    for text in (
        "<dt>Seed</dt><dd>7</dd>",
        "<dt>Last candidate</dt><dd>2026-11-26 09:39:08 UTC</dd>",
        "<dt>Versions</dt><dd>Python 3.11.7, torch 2.13.0, ray 2.60.0</dd>",
        "config.yaml, resolved",
        "crowding: 0.01",  # a key of the config
        f"--metric {run.path / 'best_metric.json'}",
        "has 8 members with\n7 different masks, at a mean distance of\n0.250.",
    ):
        assert text in html


def test_page_of_an_unfinished_run_says_so_and_shows_its_journal(tmp_path):
    with closing(write_run(tmp_path / "run", records_of(30))) as folder:
        html = page_of(folder)
    assert "This run has not ended: the report shows its first 30 candidates." in html
    assert 'class="verdict' not in html
    shown = [section for section in SECTIONS if f'<h2 id="{section}">' in html]
    assert shown == ["best", "search", "learned", "front", "ancestry"]


def test_page_of_an_extended_run_says_what_its_results_are_of():
    records = records_of(30)
    summary = summary_of(records[:20] + records[-1:])
    machine = {"python": "3.11.7", "cores": 2, "platform": "Linux", "cuda": [], "packages": {}}
    html = render(Run(CONFIG, records, SCALE, machine, "2026-11-26", summary, "apply it", "go on"))
    assert "cover the first 21 candidates, everything else covers 30" in html


def test_report_with_a_damaged_summary_is_refused(tmp_path):
    with closing(write_run(tmp_path / "run", records_of(12))) as folder:
        folder.write_json("summary.json", {"tasks": [], "best": {}})
        with pytest.raises(FolderError, match=r"summary\.json is damaged at "):
            write_report(folder)


def test_tables_name_their_columns_and_rows_and_the_page_its_main_part(html):
    assert html.count("<table>") == html.count("<thead>") > 5
    assert not re.search(r"<th(?! scope=)[ ]", html)
    assert html.count("<main>") == 1


def test_drawings_say_what_they_show(html):
    labels = [unescape(label) for label in re.findall(r'<svg role="img" aria-label="(.*?)"', html)]
    assert labels[0] == "dense 25.00, best found 30.00, wanda 35.00, snip 50.00"
    assert any("the best falls from" in label and "to 3.0000" in label for label in labels)
    assert len(labels) == 4


def test_page_is_whole_without_anything_from_elsewhere(html):
    found = Page(html)
    assert not {"script", "link", "img", "iframe"} & found.tags
    assert [link for link in found.links if not link.startswith("#")] == []
    assert "@import" not in html
    assert len(found.ids) == len(set(found.ids))
    assert {*found.references, *(link[1:] for link in found.links)} <= set(found.ids)


def test_page_is_the_same_each_time(run, html):
    assert page_of(run) == html


def test_page_shows_the_winner_as_formula_tree_and_text(html):
    best = html[html.index('<h2 id="best">') : html.index('<h2 id="report">')]
    assert "<math" in best
    assert '<code class="copy">mul(W, add(G, sqr(W)))</code>' in best
    nodes = re.findall(r"<li><span.*?>(\w+)</span>", best)
    assert nodes == ["mul", "W", "add", "G", "sqr", "W"]


def test_page_warns_of_layers_above_ninety_percent_zeros(html):
    assert (
        "best found leaves 1 layer above 90% zeros: model.layers.1.mlp.down_proj (95.0%)</p>"
    ) in html


def test_page_escapes_what_comes_from_files(html):
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&lt;b&gt;" in html


@pytest.mark.slow
def test_page_of_six_hundred_candidates_is_below_400_kilobytes(tmp_path):
    records = records_of(600)
    with closing(write_run(tmp_path / "run", records, summary_of(records))) as folder:
        assert len(page_of(folder).encode()) < 400_000


def test_rows_are_those_of_the_task():
    summary = summary_of(records_of(12))
    rows = tables.perplexity_rows(summary.tasks[0], summary.best)
    assert [(name, group, value, behind) for name, _, group, _, value, behind in rows] == [
        ("dense", "", "25.00", ""),
        ("best found", "row", "30.00", ""),
        ("wanda", "row", "35.00", "+0.1500 ± 0.0100"),
        ("snip", "model", "50.00", "+0.5000"),
    ]


def front_of(*sizes_and_fitness):
    texts = {1: "W", 2: "abs(W)", 3: "mul(W, G)", 4: "mul(W, sqrt(X))", 5: "mul(abs(W), sqr(G))"}
    return [
        record_of(index, texts[size], fitness)
        for index, (size, fitness) in enumerate(sizes_and_fitness)
    ]


def test_trade_off_is_the_largest_fall_for_each_node_added():
    front = front_of((1, 3.5), (3, 2.9), (4, 2.8), (5, 2.7))
    assert page.falls_per_node(front) == [None, *map(pytest.approx, (0.3, 0.1, 0.1))]
    assert page.trade_off(front, SCALE) is front[1]
    # But it rises at most half as much again as the fittest.
    front = front_of((1, 9.0), (2, 4.0), (4, 3.2), (5, 3.1))
    assert page.trade_off(front, SCALE) is front[2]
    # The table leaves the others out, and begins with it.
    rows = page.front_rows(front, front[2], SCALE, None)
    assert [row[:2] for row in rows] == [("4, best trade-off", "3.2000"), ("5", "3.1000")]


def test_charts_name_dense_the_named_metrics_and_what_is_above_them():
    records = front_of((1, 4.0), (3, 3.4), (4, 3.2))
    chart = charts.front_chart("front", records, records, records[1], SCALE)
    for name in ("wanda", "snip", "dense", "best trade-off", "Pareto front"):
        assert f">{name}</text>" in chart
    assert "; dense 2.0000; wanda 3.0000; snip 3.5000" in chart
    records = front_of((1, 3.2), (2, 5.5), (3, 3.1))
    chart = charts.fitness_chart("f", records, SCALE)
    for name in ("dense", "wanda", "snip", "evaluated", "best so far"):
        assert f">{name}</text>" in chart
    assert ">fitness, nats/token (1 above the chart)</text>" in chart
    assert "the best falls from 3.2000 to 3.1000" in chart


@pytest.mark.parametrize("most", [36.0, 5000.0])
def test_perplexity_chart_has_ticks_and_a_bar_for_each_known_error(most):
    task = TaskResult.model_validate(task_of(baselines={"wanda": 35.0, "snip": most}))
    chart = charts.perplexity_chart("p", task)
    axis = chart[chart.index('id="p-matplotlib.axis_1"') : chart.index('id="p-matplotlib.axis_2"')]
    assert len(re.findall(r">[\d.e+]+</text>", axis)) >= 2
    assert chart.count('id="p-LineCollection') == 4


def test_outcome_map_has_the_shares_of_each_span():
    records = [record_of(index, "W", 2.0) for index in range(4)]
    records[3] = replace(records[3], outcome=replace(records[3].outcome, kind="stopped"))
    outcomes = tables.outcome_map(records, most=2)
    assert outcomes.columns == ["0", "2"]
    assert outcomes.rows == {"evaluated": [1.0, 0.5], "stopped": [None, 0.5]}


def test_factor_rows_begin_with_the_factor_that_the_winner_cannot_do_without():
    rows = tables.factor_rows(summary_of(records_of(6)))
    assert rows == [("W", "cannot prune"), ("add(G, sqr(W))", "+0.2500 ± 0.0100")]


def test_ancestry_goes_back_by_generations_and_names_each_once():
    records = records_of(9)
    assert [(d, r.index) for d, r in page.ancestry(records, records[6])] == [
        *((0, 6), (1, 4), (1, 5), (2, 2), (2, 3), (3, 0), (3, 1))
    ]


def test_ancestry_begins_at_the_winner_in_its_own_group():
    records = records_of(6)
    best = summary_of(records)
    records[3] = record_of(3, records[5].criterion.text, 3.0, "layer")
    assert page.winner_of([r for r in records if r.fitness], best) == records[5]
