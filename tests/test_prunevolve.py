"""The Python API: the examples of docs/PYTHON.md, and how a search ends."""

import importlib
import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from doc_examples import blocks_of, run_examples
from toy_setup import small

import prunevolve
from prunevolve import evolve, resume
from prunevolve.configs import schema

PAGE = Path(prunevolve.__file__).parents[1] / "docs/PYTHON.md"
SMALL = ["ray.workers=0", "search.candidates=7", "search.population=4", "search.stages=[1]"]
SMALL += ["search.lag=2", *small(2)]


def config(*more):
    return schema.load(None, [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    records = []
    with redirect_stdout(io.StringIO()) as printed:
        result = evolve(config(), out, records.append)
    return result, records, printed.getvalue()


def journal(folder):
    return (folder / "journal.jsonl").read_text()


def test_run_gives_every_record_in_order_and_the_winner_and_prints_nothing(finished):
    result, records, printed = finished
    assert printed == ""
    assert [record.index for record in records] == list(range(7))
    assert len(journal(result.folder).splitlines()) == 7
    best = result.summary["best"]
    assert (result.best.text, result.best.group) == (best["metric"], best["group"])
    assert result.summary["candidates"] == 7


def test_search_in_this_process_leaves_its_threads_as_they_were(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        evolve(config("search.candidates=1"), tmp_path / "run")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_callback_that_raises_ends_the_run_which_can_be_resumed(finished, tmp_path):
    class Enough(Exception):
        pass

    def stop(record):
        if record.index == 3:
            raise Enough("four are enough")

    out = tmp_path / "run"
    with pytest.raises(Enough, match="four are enough"):
        evolve(config(), out, stop)
    assert (out / "checkpoint.json").exists()
    begun = len(journal(out).splitlines())
    assert 4 <= begun < 7
    fresh = []
    result = resume(str(out), on_record=fresh.append)
    assert [record.index for record in fresh] == list(range(begun, 7))
    assert journal(out) == journal(finished[0].folder)
    assert result.best == finished[0].best


def test_interrupt_reaches_the_caller_with_the_way_on(tmp_path):
    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"interrupted after \d candidates; continue with"):
        evolve(config(), tmp_path / "run", interrupt)


def test_examples_of_the_page_run_and_give_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(blocks_of(PAGE)) >= 14
    assert len(capsys.readouterr().out.splitlines()) == 6  # candidates


@pytest.mark.parametrize(("module", "names"), prunevolve._PUBLIC.items())
def test_every_name_of_the_api_has_a_docstring_and_is_on_the_page(module, names):
    assert set(names) == set(importlib.import_module(module).__all__)
    for name in names:
        assert getattr(prunevolve, name).__doc__
        assert f"`prunevolve.{name}`" in PAGE.read_text(encoding="utf-8")
