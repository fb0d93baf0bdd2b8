"""What is made from code is what stands in the files."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITTEN = runpy.run_path(str(ROOT / "scripts/write_generated.py"))


@pytest.mark.parametrize("path", WRITTEN["generated"](), ids=lambda path: path.name)
def test_generated_file_is_what_the_code_makes(path):
    made = WRITTEN["generated"]()[path]
    assert path.read_text(encoding="utf-8") == made, "run scripts/write_generated.py"
