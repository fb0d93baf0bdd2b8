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
COPIED = (
    "configs",
    "docs",
    "evaluation",
    "prunevolve",
    "pruning",
    "scripts",
    "search",
    "tests/helpers",
)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project in which every block stands where the page says."""
    root = tmp_path_factory.mktemp("extended")
    for folder in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    for module in ROOT.glob("*.py"):
        shutil.copy(module, root)
    for block in blocks_of(PAGE):
        if PLACED.match(block):
            put_in(root, block)
    return root


def run(root, *arguments):
    places = os.pathsep.join([str(root), str(root / "tests/helpers")])
    environment = {**os.environ, "PYTHONPATH": places}
    done = search_process.run([sys.executable, *arguments], cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_add_what_works(extended):
    assert run(extended, "tests/helpers/doc_examples.py", str(PAGE)) == "8\n"


def test_tables_and_schema_take_the_additions(extended):
    printed = run(extended, "scripts/write_generated.py")
    assert printed == "docs/METRICS.md written\nconfigs/schema.json written\n"
    text = (extended / "docs/METRICS.md").read_text(encoding="utf-8")
    assert "| `cbrt` | cube root of x, with its sign |" in text
    assert "| `P` | `(1, in)` | x | highest absolute activation" in text
    assert '"column"' in (extended / "configs/schema.json").read_text(encoding="utf-8")
