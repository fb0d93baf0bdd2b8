"""The Python API: the examples of docs/PYTHON.md run."""

from pathlib import Path

import pytest
from doc_examples import blocks_of, run_examples

import prunevolve

ROOT = Path(__file__).parents[1]


def test_examples_of_the_page_run_and_give_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(blocks_of(ROOT / "docs/PYTHON.md")) >= 14
    assert len(capsys.readouterr().out.splitlines()) == 13  # three metrics, ten candidates


@pytest.mark.parametrize("name", prunevolve.__all__)
def test_every_name_of_the_api_has_a_docstring_and_is_on_the_page(name):
    assert getattr(prunevolve, name).__doc__
    assert f"`prunevolve.{name}`" in (ROOT / "docs/PYTHON.md").read_text(encoding="utf-8")
