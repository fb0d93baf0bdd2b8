"""What an entry of `search.seeds` may be, and that its texts mean the same."""

import shutil

import pytest
from refusals import refusal
from toy_records import record_of

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.masks import GROUPS
from prunevolve.search.breeding.variation import read_seeds
from prunevolve.search.run_folder import RunFolder


def texts(entries: list[str], group: str = "row") -> list[str]:
    criteria = read_seeds(entries, group)
    assert {criterion.group for criterion in criteria} <= {group}
    return [criterion.text for criterion in criteria]


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with its best metric."""
    folder = RunFolder.create(tmp_path / "run")
    folder.write_best(record_of(3, "add(G, W)", 1.0), {})
    folder.close()
    return folder.path


@pytest.mark.parametrize("group", GROUPS)
def test_read_seeds_takes_a_name_or_a_text_under_the_group_that_is_searched(group):
    for name, metric in NAMED.items():
        assert texts([name], group) == [metric.criterion.text]
    assert texts(["mul(W, sqr(G))"], group) == ["mul(W, sqr(G))"]


def test_read_seeds_takes_the_best_of_a_run(run, monkeypatch):
    assert texts([str(run)]) == ["add(G, W)"]
    monkeypatch.setenv("HOME", str(run.parent))
    assert texts(["~/run"]) == ["add(G, W)"]


def test_read_seeds_keeps_the_order_and_drops_repeats(run):
    entries = ["W", "snip", str(run), "mul(W, G)", "W"]
    assert texts(entries) == ["W", "mul(W, G)", "add(G, W)"]
    assert texts([]) == []


def test_read_seeds_refuses_what_is_no_metric_in_one_line():
    message = refusal(read_seeds, ["model:wanda"], "row")
    assert message.startswith("metric 'model:wanda' is no known name or file: did you mean ")


def test_read_seeds_reads_back_what_was_written_without_the_files(run):
    seeds = read_seeds([*NAMED, "mul(W, 0.25)", str(run)], "layer")
    shutil.rmtree(run)
    assert len(seeds) > 8
    assert read_seeds([criterion.text for criterion in seeds], "layer") == seeds
