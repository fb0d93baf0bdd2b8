"""The end table and report.html: what they show of a run's files, old and new."""

import random
import re
from html.parser import HTMLParser

import pytest
from report_run import BLOCKS, KINDS, metric_text, records_of, summary_of, write_run
from toy_records import record_of

from pruning.metric import Metric
from search.finish import write_report
from search.population import pareto_front
from search.report import charts, fitness_charts, history, layers, sections
from search.report.drawing import tree_svg
from search.report.page import table_rows, tasks_of, title_of


class Page(HTMLParser):
    """Collects what the tests ask a page for."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.links, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "xlink:href", "src"):
                self.links.append(value)
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")


def page_of(folder):
    write_report(folder)
    return (folder.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two tasks; names of the second are HTML."""
    records = records_of(120)
    summary = summary_of(records)
    hostile = summary["tasks"][1]
    hostile["name"] = "<script>alert(1)</script>"
    hostile["layers"] = {**hostile["layers"], "<b>": hostile["layers"]["wanda"]}
    folder = write_run(tmp_path_factory.mktemp("report") / "run", records, summary)
    yield folder
    folder.close()


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


# The page


def test_page_shows_every_section(page):
    for section in ("best", "report", "finalists", "search", "front", "ancestry", "layers"):
        assert f'<h2 id="{section}">' in page


def test_page_has_each_chart_with_its_numbers(page):
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles[:6] == [
        "Fitness against candidates bred",
        "Fitness against seconds",
        "Outcomes over the candidates",
        "Bred metrics that contain a leaf",
        "Bred metrics that contain an operator",
        "Fitness against size",
    ]
    by_task = [
        "Zeros, by block",
        "Zeros, by kind of matrix",
        "Zeros of the best found, layer by layer",
        "Mask overlap with the best found, by block",
        "Mask overlap with the best found, by kind of matrix",
    ]
    assert titles[6:] == by_task * 2
    assert page.count("<summary>numbers</summary>") == len(titles)


def test_page_is_whole_without_anything_from_elsewhere(page):
    found = Page(page)
    assert not {"script", "link", "img", "iframe"} & set(found.open)
    assert [link for link in found.links if not link.startswith("#")] == []
    assert "@import" not in page


def test_page_has_no_id_twice_and_none_missing(page):
    found = Page(page)
    assert len(found.ids) == len(set(found.ids))
    assert {*found.references, *(link[1:] for link in found.links)} <= set(found.ids)


def test_page_is_the_same_each_time(run, page):
    assert page_of(run) == page


def test_page_of_an_older_run_leaves_out_what_was_not_measured(tmp_path):
    records = records_of(30)
    summary = summary_of(records)
    for key in ("tasks", "diversity"):
        del summary[key]
    folder = write_run(tmp_path / "run", records, summary, timings=False)
    page = page_of(folder)
    folder.close()
    assert "Report text" in page
    assert 'id="layers"' not in page
    assert "different masks" not in page
    assert "Fitness against seconds" not in page


def test_page_tells_the_diversity(page):
    assert "has 8 members with\n7 different masks, at a mean distance of\n0.250." in page


def test_page_shows_the_winner_as_drawing_text_and_latex(page):
    assert '<svg role="img" aria-label="mul(W, add(G, sqr(W)))"' in page
    assert '<code class="copy">mul(W, add(G, sqr(W)))</code>' in page
    assert r'<code class="copy">W \, \left(G + W^{2}\right)</code>' in page


def test_page_warns_of_layers_above_ninety_percent_zeros(page):
    warning = page[page.index('<div class="warning"') :]
    assert "best found leaves 1\nlayer with more than 90% zeros:" in warning
    assert "model.layers.1.mlp.down_proj (95.0%)" in warning


def test_page_escapes_what_comes_from_files(page):
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;" in page


@pytest.mark.slow
def test_page_of_three_thousand_candidates_is_far_below_five_megabytes(tmp_path):
    folder = write_run(tmp_path / "run", records_of(3000))
    size = len(page_of(folder).encode())
    folder.close()
    assert size < 2_500_000


# The table


def test_each_task_has_its_own_title_and_rows():
    first, second = tasks_of(summary_of(records_of(12)))
    assert title_of(first).startswith("perplexity at 60% unstructured on ")
    assert title_of(second).startswith("perplexity at 2:4 on ")
    assert table_rows(first)[-1][4] == "30.00"
    assert table_rows(second)[-1][4] == "40.00"
    assert table_rows(second)[-1][2] == "2:4"


def test_a_run_without_tasks_is_its_own_only_task():
    summary = summary_of(records_of(12))
    del summary["tasks"]
    assert tasks_of(summary) == [summary]


def test_table_shows_a_baseline_that_it_does_not_know():
    summary = summary_of(records_of(12))
    summary["baselines"]["another"] = 99.0
    summary["behind_best"]["another"] = {"nats": 1.0, "standard_error": None}
    assert table_rows(summary)[1] == ("another", "", "", "", "99.00", "+1.0000")


# What the journal tells


def test_elapsed_is_the_busy_time_over_the_number_of_workers():
    timings = {0: {"seconds": 4.0, "worker": 0}, 2: {"seconds": 6.0, "worker": 1}}
    assert history.elapsed_seconds(4, timings) == [2.0, 2.0, 5.0, 5.0]


def test_elapsed_without_timings_is_nothing():
    assert history.elapsed_seconds(2, {}) == [0.0, 0.0]


def test_front_holds_what_no_smaller_metric_beats():
    records = records_of(200)
    front = pareto_front(records)
    measured = [r for r in records if r.fitness is not None]
    for one in front:
        assert all(r.fitness >= one.fitness for r in measured if r.size <= one.size)
    assert front[-1].fitness == min(r.fitness for r in measured)


def test_bins_cover_all_candidates_once_with_one_width():
    spans = history.bins(101, most=10)
    assert [index for span in spans for index in span] == list(range(101))
    assert {len(span) for span in spans[:-1]} == {11}


def test_shares_count_every_bred_metric_once_a_span():
    texts = ("mul(W, W)", "W", "abs(W)", "mul(W, G)")
    records = [record_of(index, text, 2.0) for index, text in enumerate(texts)]
    leaves, operators = history.shares_by_bin(records, [range(0, 2), range(2, 4)])
    assert leaves == {"W": [1.0, 1.0], "G": [0.0, 0.5]}
    assert operators == {"mul": [0.5, 0.5], "abs": [0.0, 0.5]}


def test_ancestry_goes_back_by_generations_and_names_each_once():
    records = records_of(9)
    assert [(d, r.index) for d, r in history.ancestry(records, records[6], generations=2)] == [
        *((0, 6), (1, 4), (1, 5), (2, 2), (2, 3)),
    ]


def test_lineage_begins_at_the_winner_in_its_own_group():
    records = records_of(6)
    winner = records[5].criterion.text
    records[3] = record_of(3, winner, 3.0, "layer")
    best = {"metric": winner, "group": "row"}
    assert sections.lineage(records, best)[0] == (0, records[5])
    assert sections.lineage(records, {**best, "group": "model"}) == []


# Layers


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("model.layers.12.self_attn.q_proj", (12, "q_proj")),
        ("model.decoder.layers.0.fc1", (0, "fc1")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_place_reads_block_and_kind_from_a_name(layer, expected):
    assert layers.place(layer) == expected


def test_by_place_averages_over_layers():
    zeros = {"wanda": {"layers.0.q_proj": 0.2, "layers.0.fc1": 0.4, "layers.1.q_proj": 0.8}}
    block, kind = layers.by_place("x", "Zeros", zeros)
    assert block.rows == [("0", "30.00%"), ("1", "80.00%")]
    assert kind.rows == [("q_proj", "50.00%"), ("fc1", "40.00%")]


def test_layers_of_a_task_have_every_layer_in_the_table():
    task = summary_of(records_of(12))["tasks"][0]
    headings, rows = layers.layers("x", task)["tables"]["Zeros of every layer"]
    assert headings == ("layer", "best found", "wanda", "snip")
    assert len(rows) == BLOCKS * len(KINDS)


def test_crowded_takes_only_layers_above_the_limit_fullest_first():
    zeros = {"a": {"x": 0.9, "y": 0.91, "z": 1.0}, "b": {"x": 0.5}}
    assert layers.crowded(zeros) == {"a": [("z", 1.0), ("y", 0.91)]}


# Drawings


def test_tree_has_a_box_for_every_node():
    metric = Metric.parse("mul(abs(mul(W, W)), mms(G))")
    assert tree_svg("t", metric).count("<text") == metric.size


def test_chart_ids_differ_between_charts():
    shares, spans = {"W": [0.5, 1.0]}, [range(0, 2), range(2, 4)]
    one, other = (
        set(re.findall(r'id="([^"]+)"', charts.shares_chart(name, "t", shares, spans).svg))
        for name in ("one", "other")
    )
    assert one
    assert not one & other


def test_fitness_chart_prints_every_evaluated_candidate():
    records = records_of(60)
    chart = fitness_charts.fitness_chart("f", records, range(60), "candidate", "candidates", "nats")
    assert [row[0] for row in chart.rows] == [str(r.index) for r in records if r.fitness]


def test_metric_text_makes_metrics_of_many_sizes():
    generator = random.Random(0)
    sizes = {Metric.parse(metric_text(generator)).size for _ in range(50)}
    assert len(sizes) > 5
