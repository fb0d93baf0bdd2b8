"""The Python API: the examples and the names of docs/PYTHON.md."""

import importlib
from pathlib import Path

import pytest
from doc_examples import blocks_of, run_examples

import prunevolve

PAGE = Path(prunevolve.__file__).parents[1] / "docs/PYTHON.md"


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
