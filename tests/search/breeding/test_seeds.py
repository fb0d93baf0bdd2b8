"""What an entry of `search.seeds` may be, and that its texts mean the same."""

import json
import shutil

import pytest
from refusals import refusal
from toy_records import record_of

from prunevolve.configs.schema import Search
from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.parse import named_metric
from prunevolve.search.breeding.variation import read_seeds
from prunevolve.search.population import State
from prunevolve.search.run_folder import RunFolder


def texts(entries: list[str], group: str = "row") -> list[str]:
    criteria = read_seeds(entries, group)
    assert {criterion.group for criterion in criteria} <= {group}
    return [criterion.text for criterion in criteria]


@pytest.fixture
def run(tmp_path):
    """The folder of a run: two in its population, a third in its hall of fame, a newer best."""
    folder = RunFolder.create(tmp_path / "run")
    state = State()
    for index, (metric, fitness) in enumerate([("abs(G)", 9.0), ("W", 3.0), ("mul(G, W)", 2.0)]):
        state = state.commit(record_of(index, metric, fitness), Search(population=2))
    folder.write_checkpoint(state, state)
    folder.write_best(record_of(3, "add(G, W)", 1.0), {})  # newer than the checkpoint
    folder.close()
    return folder.path


OF_RUN = ["add(G, W)", "mul(G, W)", "W", "abs(G)"]
"""Best first."""


@pytest.mark.parametrize("group", GROUPS)
def test_read_seeds_takes_a_name_or_a_text_under_the_group_that_is_searched(group):
    for name in NAMED:
        assert texts([name], group) == [named_metric(name).text]
    assert texts(["mul(W, sqr(G))"], group) == ["mul(W, sqr(G))"]


def test_read_seeds_takes_all_of_a_run_folder_best_first(run, monkeypatch):
    assert texts([str(run)]) == OF_RUN
    monkeypatch.setenv("HOME", str(run.parent))
    assert texts(["~/run"]) == OF_RUN


def test_read_seeds_keeps_the_order_and_drops_repeats(run):
    entries = ["W", "snip", str(run), "mul(W, G)"]
    assert texts(entries) == ["W", "mul(W, G)", "add(G, W)", "mul(G, W)", "abs(G)"]
    assert texts([]) == []


def test_read_seeds_refuses_what_is_no_metric_in_one_line():
    message = refusal(read_seeds, ["model:wanda"], "row")
    assert message.startswith("metric 'model:wanda' is no known name or file: did you mean ")


def test_read_seeds_takes_the_folder_of_a_version_that_tuned_no_numbers(run):
    path = run / "checkpoint.json"
    state = json.loads(path.read_text())
    del state["tuning"], state["tuned"]
    path.write_text(json.dumps(state))
    assert texts([str(run)]) == OF_RUN


def test_read_seeds_refuses_a_damaged_checkpoint(run):
    path = run / "checkpoint.json"
    path.write_bytes(path.read_bytes()[:-9])
    expected = f"checkpoint {path} is missing, damaged or from another version"
    assert refusal(read_seeds, [str(run)], "row") == expected


def test_read_seeds_reads_back_what_was_written_without_the_files(run):
    seeds = read_seeds([*NAMED, "mul(W, 0.25)", str(run)], "layer")
    shutil.rmtree(run)
    assert len(seeds) > 8
    assert read_seeds([criterion.text for criterion in seeds], "layer") == seeds
