"""The Python API: the examples of docs/PYTHON.md run, and the packages stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pruning
import search

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_examples(text):
    """Run blocks one after the other; where a line ends in a comment, it is the value's repr."""
    namespace = {}
    shown = 0
    for block in BLOCK.findall(text):
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            _, _, expected = lines[statement.end_lineno - 1].partition("  # ")
            source = ast.get_source_segment(block, statement)
            if isinstance(statement, ast.Expr) and expected:
                assert repr(eval(source, namespace)) == expected, source
                shown += 1
            else:
                exec(source, namespace)
    return shown


def test_the_examples_of_the_page_run_and_give_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples((ROOT / "docs/PYTHON.md").read_text(encoding="utf-8")) >= 14
    assert len(capsys.readouterr().out.splitlines()) == 13  # three metrics, ten candidates


def test_an_example_that_gives_something_else_fails():
    with pytest.raises(AssertionError, match="1 \\+ 1"):
        run_examples("```python\nx = 1  # not looked at\n1 + 1  # 3\n```\n")


@pytest.mark.parametrize("package", [pruning, search], ids=lambda package: package.__name__)
def test_every_name_of_the_api_is_there_and_on_the_page(package):
    page = (ROOT / "docs/PYTHON.md").read_text(encoding="utf-8")
    for name in package.__all__:
        assert getattr(package, name).__doc__
        assert f"`{package.__name__}.{name}`" in page
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
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
