"""The end table and report.html: what they show of a run's files, old and new."""

import random
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_run import BLOCKS, KINDS, metric_text, records_of, summary_of, write_run
from toy_records import record_of

from configs import schema
from pruning.metric import Metric
from search.finish import write_report
from search.population import pareto_front
from search.report import charts, fitness_charts, history, layers, palette, sections
from search.report.drawing import tree_svg
from search.report.fitness_charts import References
from search.report.page import render, table_rows, tasks_of, title_of
from search.report.run import Run
from search.scale import Scale, cell_of


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
    assert titles[:8] == [
        *["Perplexity on the report text"] * 2,
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
    assert titles[8:] == by_task * 2
    assert page.count("<summary>numbers</summary>") == len(titles)


def test_page_says_on_top_what_was_searched_and_what_came_of_it(page):
    assert "<h1>Search for a pruning metric for embedded at 60% and 2:4</h1>" in page
    assert "<title>Search for a pruning metric for embedded at 60% and 2:4</title>" in page
    verdict = page.index('<p class="verdict worse"')
    assert verdict < page.index('<nav aria-label="Sections">')
    assert "better on 1 of 2 tasks" in page[verdict : verdict + 400]
    assert "Beats wanda, the best named metric on the report text: perplexity 30.00" in page


def test_page_shows_where_the_run_comes_from(tmp_path):
    folder = write_run(tmp_path / "run", records_of(12))
    folder.write_text("config.yaml", schema.to_yaml(schema.load(None, ["search.seed=7"])))
    packages = {"torch": "2.13.0", "ray": "2.60.0"}
    machine = {
        "python": "3.11.7",
        "cores": 2,
        "platform": "Linux",
        "cuda": [],
        "packages": packages,
    }
    folder.write_json("environment.json", machine)
    folder.write_json("status.json", {"written": "2026-11-26T09:39:08+00:00"})
    page = page_of(folder)
    folder.close()
    assert "<dt>Seed</dt><dd>7</dd>" in page
    assert "<dt>Last candidate</dt><dd>2026-11-26 09:39:08 UTC</dd>" in page
    assert "<dt>Versions</dt><dd>Python 3.11.7, torch 2.13.0, ray 2.60.0</dd>" in page
    assert "config.yaml, resolved" in page
    assert "fingerprint: true" in page  # a key of the config
    words = re.findall(r'<span class="word">(.*?)</span>', page)
    assert words[0] == "prunevolve-prune"
    assert f"{tmp_path / 'run' / 'best_metric.json'}" in words


def test_page_of_a_run_that_goes_on_says_so_and_shows_its_journal():
    page = render(Run(records_of(30)))
    assert "This run has not ended: the report shows its first 30 candidates." in page
    assert 'class="verdict' not in page
    for section in ("best", "search", "front", "ancestry"):
        assert f'<h2 id="{section}">' in page
    for section in ("report", "finalists", "layers"):
        assert f'<h2 id="{section}">' not in page


def test_page_of_a_run_that_was_killed_is_made_of_its_journal(tmp_path):
    folder = write_run(tmp_path / "run", records_of(12))
    (folder.path / "summary.json").unlink()
    page = page_of(folder)
    folder.close()
    assert "This run has not ended: the report shows its first 12 candidates." in page


def test_page_of_a_run_without_a_candidate_is_a_page():
    page = render(Run([]))
    assert "its first 0 candidates" in page


def test_page_of_an_extended_run_says_what_its_results_are_of():
    records = records_of(30)
    page = render(Run(records, summary_of(records[:20] + records[-1:])))
    assert "cover the first 21 candidates, everything else covers 30" in page


def test_tables_name_their_columns_and_rows_and_the_page_its_main_part(page):
    assert page.count("<table>") == page.count("<thead>") > 5
    assert not re.search(r"<th(?! scope=)[ >]", page)
    assert page.count("<main>") == 1


def test_drawings_say_what_they_show_and_not_only_what_they_are(page):
    labels = [unescape(label) for label in re.findall(r'<svg role="img" aria-label="(.*?)"', page)]
    charts_of = [label for label in labels if ": " in label]
    assert "Perplexity on the report text: dense 25.00, best found 30.00, wanda 35.00" in labels[2]
    assert any("the best falls from" in label and "to 3.0000" in label for label in charts_of)
    assert any(re.search(r"Zeros, by block: best found \d+\.\d% to ", label) for label in charts_of)
    assert len(charts_of) >= len(re.findall("<figure>", page))


def test_drawings_take_their_colours_from_the_page(page):
    body = page[page.index("<body>") :]
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body)) == set()
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    assert used <= {*palette.COLOURS, "shade"}


def test_no_two_colours_of_the_palette_are_one():
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)


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
    (one,), (other,) = (
        [row for row in table_rows(task) if row[0] == "best found"] for task in (first, second)
    )
    assert (one[4], other[4], other[2]) == ("30.00", "40.00", "2:4")


def test_table_has_dense_on_top_and_the_best_next():
    rows = table_rows(summary_of(records_of(12)))
    assert rows[0][0] == "dense"
    perplexities = [float(row[4]) for row in rows[1:]]
    assert perplexities == sorted(perplexities)


def test_a_run_without_tasks_is_its_own_only_task():
    summary = summary_of(records_of(12))
    del summary["tasks"]
    assert tasks_of(summary) == [summary]


def test_table_shows_a_baseline_that_it_does_not_know():
    summary = summary_of(records_of(12))
    summary["baselines"]["another"] = 99.0
    summary["behind_best"]["another"] = {"nats": 1.0, "standard_error": None}
    assert table_rows(summary)[-1] == ("another", "", "", "", "99.00", "+1.0000")


# The front


def front_of(*sizes_and_fitness):
    texts = {1: "W", 2: "abs(W)", 3: "mul(W, G)", 4: "mul(W, sqrt(X))", 5: "mul(abs(W), sqr(G))"}
    return [
        record_of(index, texts[size], fitness)
        for index, (size, fitness) in enumerate(sizes_and_fitness)
    ]


SCALE = Scale(
    aggregate="mean",
    order=(0,),
    cells=(cell_of(0, "text", 1.0, range(2), [1.0, 3.0], {"wanda": [2.0, 4.0], "snip": [2, 5]}),),
)
"""The dense model's fitness is 2, that of wanda 3, that of snip 3.5."""


def test_trade_off_is_the_largest_fall_for_each_node_added():
    front = front_of((1, 4.0), (3, 3.4), (4, 3.2), (5, 3.1))
    assert sections.falls_per_node(front) == [None, *map(pytest.approx, (0.3, 0.2, 0.1))]
    assert sections.trade_off(front, None) is front[1]


def test_trade_off_is_none_that_rises_half_as_much_again_as_the_fittest():
    front = front_of((1, 9.0), (2, 4.0), (4, 3.2), (5, 3.1))
    assert sections.trade_off(front, None) is front[1]
    assert sections.trade_off(front, SCALE) is front[2]


def test_front_tells_the_report_perplexity_of_whom_it_is_known():
    records = front_of((1, 4.0), (3, 3.4), (4, 3.2), (5, 3.1))
    records[2] = record_of(2, "mul(W, sqrt(X))", 3.2, "row")  # wanda
    summary = summary_of(records_of(6))
    summary["best"] |= {"metric": records[3].criterion.text, "group": "row"}
    summary["tasks"][0]["front"] = [{"index": 1, "perplexity": 33.0}]
    members = sections.front(records, "nats", References(), SCALE, tasks_of(summary))["members"]
    assert [one["perplexities"] for one in members] == [
        # Under 2:4, which has groups of its own, the second is snip.
        *([None, None], [33.0, 50.0], [35.0, 35.0], [30.0, 40.0]),
    ]


def test_front_chart_has_the_named_metrics_at_their_sizes_and_dense_as_a_line():
    records = front_of((1, 4.0), (3, 3.4), (4, 3.2))
    chart = sections.front(records, "nats", sections.references(SCALE), SCALE, [])["chart"]
    assert ("4", "3.0000", "", "wanda", "") in chart.rows
    assert ("3", "3.5000", "", "snip", "") in chart.rows
    for name in ("wanda", "snip", "dense", "best trade-off"):
        assert f">{name}</text>" in chart.svg
    assert "; dense 2.0000; wanda 3.0000; snip 3.5000" in chart.svg


def test_fitness_chart_names_a_line_for_dense_and_each_named_metric():
    known = References(2.0, {"wanda": 3.0, "snip": 3.5, "magnitude": 90.0})
    records = records_of(60)
    chart = fitness_charts.fitness_chart("f", records, range(60), "candidate", "c", "nats", known)
    for name in ("dense", "wanda", "snip", "magnitude ↑"):
        assert f">{name}</text>" in chart.svg


@pytest.mark.parametrize("heights", [[0.0, 0.0, 0.01], [0.5, 0.5, 0.5, 0.9], [0.97, 0.98, 1.0]])
def test_names_beside_a_chart_do_not_overlap_and_stay_beside_it(heights):
    places = fitness_charts.spread(heights, apart=0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 1


def test_names_that_do_not_overlap_stay_where_they_are():
    assert fitness_charts.spread([0.1, 0.5, 0.9], apart=0.1) == [0.1, 0.5, 0.9]


# Perplexities


def test_perplexity_chart_has_error_bars_of_two_standard_errors():
    task = tasks_of(summary_of(records_of(6)))[0]
    chart = sections.perplexities("p", task)
    assert [row[:2] for row in chart.rows] == [
        *(
            ("snip", "50.0000"),
            ("wanda", "35.0000"),
            ("best found", "30.0000"),
            ("dense", "25.0000"),
        ),
    ]
    assert [row[2] for row in chart.rows] == ["", "0.0100", "", ""]
    assert "2 standard errors" in chart.note


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
    assert [(d, r.index) for d, r in history.ancestry(records, records[6])] == [
        *((0, 6), (1, 4), (1, 5), (2, 2), (2, 3), (3, 0), (3, 1)),
    ]


def test_lineage_begins_at_the_winner_in_its_own_group():
    records = records_of(6)
    winner = records[5].criterion.text
    records[3] = record_of(3, winner, 3.0, "layer")
    best = {"metric": winner, "group": "row"}
    assert sections.lineage(records, best)["near"][0] == (0, records[5])
    assert sections.lineage(records, {**best, "group": "model"}) is None


def test_lineage_goes_to_its_end_and_counts_those_without_parents():
    records = records_of(12)
    best = {"metric": records[-1].criterion.text, "group": "row"}
    found = sections.lineage(records, best)
    assert [r.index for _, r in found["near"]] == [11, 9, 10, 7, 8]
    assert [r.index for _, r in found["far"]] == [5, 6, 3, 4, 1, 2, 0]
    assert (found["count"], found["generations"], found["roots"]) == (11, 6, 2)


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


def test_lines_with_the_same_numbers_are_one_under_all_their_names():
    same = {0: 0.6, 1: 0.6}
    lines = {"best found": {0: 0.5, 1: 0.7}, "wanda": same, "ria": same}
    chart = charts.lines_chart("x", "Zeros", "block", lines)
    assert ">wanda, ria</text>" in chart.svg
    assert chart.headings == ("block", "best found", "wanda", "ria")


def test_series_differ_in_dashes_and_markers_too():
    lines = {f"metric {i}": {0: 0.1 * i, 1: 0.5, 2: 0.2} for i in range(6)}
    svg = charts.lines_chart("x", "Zeros", "block", lines).svg
    dashes = re.findall(r"stroke-dasharray: ([^;\"]+)", svg)
    assert len(set(dashes)) >= 5
    shapes = set(re.findall(r'<path id="x-m\w+" d="([^"]+)"', svg))
    assert len(shapes) >= 6


@pytest.mark.parametrize("blocks", [2, 4, 30])
def test_ticks_are_at_whole_blocks(blocks):
    chart = charts.lines_chart("x", "Zeros", "block", {"wanda": dict.fromkeys(range(blocks), 0.5)})
    axis = chart.svg[
        chart.svg.index('id="x-matplotlib.axis_1"') : chart.svg.index('id="x-matplotlib.axis_2"')
    ]
    ticks = re.findall(r">(−?[\d.]+)</text>", axis)
    assert len(ticks) >= 2
    assert all(tick.lstrip("−").isdecimal() for tick in ticks)


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
    chart = fitness_charts.fitness_chart(
        "f", records, range(60), "candidate", "candidates", "nats", References()
    )
    assert [row[0] for row in chart.rows] == [str(r.index) for r in records if r.fitness]


def test_metric_text_makes_metrics_of_many_sizes():
    generator = random.Random(0)
    sizes = {Metric.parse(metric_text(generator)).size for _ in range(50)}
    assert len(sizes) > 5


def test_a_fitness_axis_ends_where_what_it_shows_does():
    known = References(0.0, {"snip": 1.0, "wanda": 1.4, "magnitude": 9.0})
    assert fitness_charts._limits([1.5, 1.1], known) == pytest.approx((-0.075, 1.575))
