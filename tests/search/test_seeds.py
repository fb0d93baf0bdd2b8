"""What an entry of `search.seeds` may be, and that its texts mean the same."""

import json

import pytest
from toy_records import record_of

from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.masks import GROUPS
from search.journal import RunFolder
from search.population import Rules, State
from search.seeds import read_seeds


def texts(entries: list[str], groups: tuple[str, ...] = GROUPS) -> list[tuple[str, str]]:
    return [(criterion.text, criterion.group) for criterion in read_seeds(entries, groups)]


def refusal(entry: str) -> str:
    with pytest.raises(ValueError) as error:
        read_seeds(["wanda", entry], GROUPS)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def run(tmp_path):
    """The folder of a run: two in its population, a third in its hall of fame alone."""
    folder = RunFolder.create(tmp_path / "run")
    state = State()
    outcomes = [("abs(G)", "model", 9.0), ("W", "layer", 3.0), ("mul(G, W)", "row", 2.0)]
    for index, (metric, group, fitness) in enumerate(outcomes):
        state = state.commit(record_of(index, metric, fitness, group), Rules(capacity=2))
    folder.write_checkpoint(state, state)
    folder.close()
    return folder.path


OF_RUN = [("mul(G, W)", "row"), ("W", "layer"), ("abs(G)", "model")]
"""Best first."""


# Entries


@pytest.mark.parametrize("name", NAMED)
def test_read_seeds_takes_a_name_with_its_own_group(name):
    assert read_seeds([name], GROUPS) == [NAMED[name].criterion]


def test_read_seeds_takes_a_text_by_row():
    assert texts(["mul(W, sqr(G))"]) == [("mul(W, sqr(G))", "row")]


@pytest.mark.parametrize("group", GROUPS)
def test_read_seeds_takes_a_group_before_a_name_or_a_text(group):
    assert texts([f"{group}:snip", f"{group}:mul(W, X)"]) == [
        *(("mul(W, G)", group), ("mul(W, X)", group)),
    ]


def test_read_seeds_takes_a_metric_file_with_its_group(tmp_path):
    path = tmp_path / "best_metric.json"
    path.write_text(json.dumps({"metric": "add(W, G)", "group": "model"}))
    assert texts([str(path), f"layer:{path}"]) == [("add(W, G)", "model"), ("add(W, G)", "layer")]


def test_read_seeds_takes_all_of_a_run_folder_best_first(run):
    assert texts([str(run)]) == OF_RUN
    assert texts([f"model:{run}"]) == [(metric, "model") for metric, _ in OF_RUN]


def test_read_seeds_takes_a_checkpoint_file_the_one_before_too(run):
    assert texts([str(run / "checkpoint.json")]) == OF_RUN
    (run / "checkpoint.json").rename(run / "checkpoint.previous.json")
    assert texts([str(run / "checkpoint.previous.json")]) == OF_RUN


def test_read_seeds_finds_a_run_below_the_home_folder(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    assert texts(["~/run"]) == OF_RUN


def test_read_seeds_takes_a_text_longer_than_a_file_name_may_be():
    text = "W"
    for _ in range(6):
        text = f"add({text}, mul(G, {text}))"
    assert len(text) > 255
    assert texts([text]) == [(text, "row")]


# The list


def test_read_seeds_keeps_the_order_and_drops_repeats(run):
    entries = ["layer:W", "snip", str(run), "model:mul(W, G)", "mul(W, G)"]
    assert texts(entries) == [
        *(("W", "layer"), ("mul(W, G)", "model"), ("mul(G, W)", "row"), ("abs(G)", "model")),
        ("mul(W, G)", "row"),
    ]


def test_read_seeds_gives_the_one_group_that_is_searched_to_all(run):
    entries = ["snip", "layer:W", "mul(W, G)", str(run)]
    assert texts(entries, ("row",)) == [
        *(("mul(W, G)", "row"), ("W", "row"), ("mul(G, W)", "row"), ("abs(G)", "row")),
    ]


def test_read_seeds_of_nothing_is_nothing():
    assert read_seeds([], GROUPS) == []


# Refusals


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("wandaa", "metric 'wandaa' is no known name: did you mean wanda? or give one of "),
        ("model:wandaa", "metric 'wandaa' is no known name: did you mean wanda? or give one of "),
        ("column:W", "metric "),
        ("model:", "metric "),
        ("", "metric "),
        ("mul(W", "metric "),
        ("X", "metric 'X' gives every row the same scores: "),
        ("layer:div(X, W)", "metric 'div(X, W)' gives every row the same scores: "),
        ("./missing", "metric './missing' looks like a file and there is no such file: "),
        ("~nobody-of-this-name/run", "metric '~nobody-of-this-name/run' looks like a file and "),
        ("checkpoint.json", "checkpoint checkpoint.json cannot be read: No such file or "),
    ],
)
def test_read_seeds_refuses_what_is_no_metric_in_one_line(entry, message):
    assert refusal(entry).startswith(message)


def test_read_seeds_refuses_a_folder_that_is_no_run(tmp_path):
    assert refusal(str(tmp_path)).startswith(
        f"metric '{tmp_path}' is a folder without best_metric.json"
    )


def test_read_seeds_refuses_a_damaged_checkpoint(run):
    path = run / "checkpoint.json"
    path.write_bytes(path.read_bytes().replace(b"9.0", b"1.0"))
    for entry in (run, path):
        expected = f"checkpoint {path} is damaged, or from another version"
        assert refusal(str(entry)) == expected


def test_read_seeds_refuses_a_runs_metric_that_cannot_rank_weights(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_checkpoint(State(1, (record_of(0, "X", 2.0),)), State())
    folder.close()
    path = folder.path / "checkpoint.json"
    expected = f"checkpoint {path} is damaged, or from another version"
    assert refusal(str(folder.path)) == expected


# Written out


@pytest.mark.parametrize("groups", [GROUPS, ("layer",)])
def test_read_seeds_reads_back_what_was_written_without_the_files(groups, run):
    seeds = read_seeds([*NAMED, "model:wanda", "mul(W, 0.25)", str(run)], groups)
    written = [str(criterion) for criterion in seeds]
    (run / "checkpoint.json").unlink()
    assert len(seeds) > 8
    assert read_seeds(written, groups) == seeds
    assert f"{groups[0]}:mul(W, sqrt(X))" in written


def test_read_seeds_reads_the_text_of_a_criterion_as_the_criterion():
    criterion = Criterion.parse("mul(W, sqrt(X))", "model")
    assert str(criterion) == "model:mul(W, sqrt(X))"
    assert read_seeds([str(criterion)], GROUPS) == [criterion]
