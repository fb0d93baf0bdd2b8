"""What is made from code is what stands in the files."""

import runpy
from pathlib import Path

import pytest

from prunevolve.pruning.baselines import NAMED
from prunevolve.pruning.masks import GROUPS
from prunevolve.pruning.operators import OPERATORS
from prunevolve.pruning.statistics import LEAVES

ROOT = Path(__file__).parents[2]
WRITTEN = runpy.run_path(str(ROOT / "scripts/write_generated.py"))


@pytest.mark.parametrize("path", WRITTEN["generated"](), ids=lambda path: path.name)
def test_generated_file_is_what_the_code_makes(path):
    made = WRITTEN["generated"]()[path]
    assert path.read_text(encoding="utf-8") == made, "run scripts/write_generated.py"


def test_tables_have_a_row_for_everything_that_has_a_name():
    lines = "".join(WRITTEN["tables"]().values()).splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert named == [*LEAVES, *OPERATORS, *GROUPS, *NAMED]
