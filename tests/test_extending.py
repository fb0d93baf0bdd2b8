"""The recipes of docs/EXTENDING.md, followed in a copy of the project."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import search_process
from doc_examples import PLACED, blocks_of, put_in

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/EXTENDING.md"
COPIED = ("configs", "docs", "evaluation", "prunevolve", "pruning", "search", "tests/helpers")


@pytest.fixture
def extended(tmp_path):
    """A copy of the project in which every block stands where the page says."""
    root = tmp_path / "extended"
    for folder in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, root)
    for block in blocks_of(PAGE):
        if PLACED.match(block):
            put_in(root, block)
    return root


def test_recipes_add_what_works(extended):
    places = os.pathsep.join([str(extended), str(extended / "tests/helpers")])
    command = [sys.executable, "tests/helpers/doc_examples.py", str(PAGE)]
    environment = {**os.environ, "PYTHONPATH": places}
    done = search_process.run(command, cwd=extended, env=environment)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
