"""The run folder: what a kill, a torn write or a stranger's file can do to it, and what not."""

import json
import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from refusals import refusal
from toy_records import record_of

from prunevolve.configs.schema import Search
from prunevolve.search.evolution import State
from prunevolve.search.records import Record
from prunevolve.search.run_folder import FolderError, RunFolder, WriteError

refused = partial(refusal, error=FolderError)
METRICS = ("W", "mul(G, W)", "mul(W, sqrt(X))", "abs(sub(W, mms(G)))", "add(G, W)")


def record(index: int, fitness: float | None = 3.5, group: str = "row") -> Record:
    reason = "worker lost: \u00fc" if fitness is None else ""
    return record_of(index, METRICS[index % len(METRICS)], fitness, group, reason=reason)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_text("config.yaml", "model: embedded\n")
    yield folder
    folder.close()


def test_create_takes_an_empty_folder_and_refuses_all_else(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a" / "b", tmp_path / "empty"):
        RunFolder.create(path).close()
        assert names(path) == set()
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    expected = f"--out {tmp_path} is not an empty folder: name another"
    assert refused(RunFolder.create, tmp_path) == expected
    (tmp_path / "config.yaml").touch()
    assert refused(RunFolder.create, tmp_path) == f"{expected}, or --resume {tmp_path}"
    assert refused(RunFolder.create, path).startswith(f"--out {path} is not an empty folder")
    below = path / "run"
    assert refused(RunFolder.create, below) == f"--out {below} cannot be created: Not a directory"
    assert path.read_text() == "mine"


def test_open_refuses_a_folder_in_use_and_takes_one_that_a_killed_process_left(folder):
    in_use = f"{folder.path} is in use by another process: wait for it to end"
    assert refused(RunFolder.open_, folder.path) == in_use
    folder.close()
    (folder.path / ".lock").touch()  # as a killed process leaves it
    RunFolder.open_(folder.path).close()
    assert names(folder.path) == {"config.yaml"}


def test_open_cuts_a_torn_last_line_at_any_byte_and_continues_the_same(folder):
    records = [record(0), record(1, None)]
    for one in records:
        folder.append(one, {})
    folder.close()
    path = folder.path / "journal.jsonl"
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        with closing(RunFolder.open_(folder.path)) as again:
            kept = again.records()
            assert kept == records[: data[:cut].count(b"\n")]
            assert len(path.read_bytes()) == data[:cut].rfind(b"\n") + 1
            if cut % 40 == 0:
                for one in records[len(kept) :]:
                    again.append(one, {})
                assert path.read_bytes() == data


GOOD = record(1).to_dict()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[" * 100_000, "recursion"),
        (b"7", "the record: "),
        (json.dumps(record(3).to_dict()).encode(), "it is candidate 3"),
        (b'{"index": \xff}', "codec can't decode"),
        # What else a record is not, tests/search/test_population.py asks.
        (json.dumps(GOOD | {"fitness": float("nan")}).encode(), "fitness: "),
    ],
)
def test_journal_with_a_damaged_whole_line_is_refused(folder, line, problem):
    folder.append(record(0), {})
    path = folder.path / "journal.jsonl"
    before = path.read_bytes() + line + b"\n" + json.dumps(record(2).to_dict()).encode() + b"\n"
    path.write_bytes(before)
    message = refused(folder.records)
    assert message == refused(folder.outcomes)
    assert message.startswith(f"{path} line 2 is damaged: ")
    assert problem in message and "\n" not in message
    way_out = "keep the 1 lines before it and resume: the rest is searched again"
    assert message.endswith(f"; {way_out}")
    assert path.read_bytes() == before


def test_hall_of_fame_marks_the_pareto_front(folder):
    state = State()
    for index, fitness in enumerate([3.5, 3.25, 3.125, None, 3.125]):
        state = state.commit(record(index, fitness, group="model"), Search(population=2))
    folder.write_hall_of_fame([], state.hall_of_fame)
    # add(G, W) is as large as mul(G, W) and fitter, and smaller than what is as fit.
    assert (folder.path / "hall_of_fame.csv").read_text() == (
        "name,size,fitness,group,metric,pareto\n"
        "0,1,3.5,model,W,true\n"
        '4,3,3.125,model,"add(G, W)",true\n'
        '2,4,3.125,model,"mul(W, sqrt(X))",false\n'
    )


def test_writing_that_fails_half_way_leaves_the_old_file_and_can_be_repeated(folder):
    folder.write_text("report.html", "old")
    with pytest.raises(UnicodeEncodeError):
        folder.write_text("report.html", "new" * 10_000 + "\ud800")
    assert (folder.path / "report.html").read_text() == "old"
    folder.write_text("report.html", "new")
    folder.write_tensors("probe.safetensors", {"W/a": torch.ones(2, 2)})
    folder.write_json("checkpoint.json", {})
    assert (folder.path / "report.html").read_text() == "new"
    assert not [name for name in names(folder.path) if "tmp" in name]
    folder.write_failure("17", "Traceback: \u00fc")
    assert (folder.path / "failures" / "17.txt").read_text() == "Traceback: \u00fc"


def test_writing_that_is_impossible_is_one_line_that_names_the_file(folder):
    folder.close()
    (folder.path / ".lock").mkdir()
    message = refusal(RunFolder.open_, folder.path, error=WriteError)
    assert message == f"{folder.path / '.lock'} cannot be written: Is a directory"
    shutil.rmtree(folder.path)
    for name, write in (
        ("report.html", lambda: folder.write_text("report.html", "new")),
        ("probe.safetensors", lambda: folder.write_tensors("probe.safetensors", {})),
        ("timings.jsonl", lambda: folder.append(record(0), {})),
    ):
        message = refusal(write, error=WriteError)
        assert message.startswith(str(folder.path / name))
        assert "cannot be written: " in message


def test_read_tensors_returns_what_was_written_and_refuses_a_damaged_file(folder):
    path = folder.path / "probe.safetensors"
    folder.write_tensors(path.name, {"W/a": torch.arange(6.0).reshape(2, 3).T})
    (found,) = folder.read_tensors(path.name).values()
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]
    os.truncate(path, path.stat().st_size - 4)
    assert refused(folder.read_tensors, path.name).startswith(f"{path} cannot be read: ")
