"""The Python API: the examples of docs/PYTHON.md run, and the packages stay light."""

import subprocess
import sys
from pathlib import Path

import pytest
from doc_examples import blocks_of, run_examples

import pruning
import search

ROOT = Path(__file__).parents[1]


def test_the_examples_of_the_page_run_and_give_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(blocks_of(ROOT / "docs/PYTHON.md")) >= 14
    assert len(capsys.readouterr().out.splitlines()) == 13  # three metrics, ten candidates


def test_an_example_that_gives_something_else_fails():
    with pytest.raises(AssertionError, match=r"1 \+ 1 is 2, and the page says 3"):
        run_examples(["x = 1  # not looked at\n1 + 1  # 3\n"])


@pytest.mark.parametrize("package", [pruning, search], ids=lambda package: package.__name__)
def test_every_name_of_the_api_is_there_and_on_the_page(package):
    page = (ROOT / "docs/PYTHON.md").read_text(encoding="utf-8")
    for name in package.__all__:
        assert getattr(package, name).__doc__
        assert f"`{package.__name__}.{name}`" in page
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def test_the_packages_import_nothing_until_a_name_is_asked_for():
    code = (
        "import sys, pruning, search, configs.schema;"
        "print([m for m in ('torch', 'transformers', 'ray', 'deap') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
