"""What is counted of a project, by hand."""

import json
import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURE = runpy.run_path(str(ROOT / "scripts/measure_code.py"))["main"]

SCHEMA = """from typing import Any

class Mutations:
    node: float = 1
    subtree: float = 1
class Search:
    seed: int = 0
    mutations: Mutations = Mutations()
    extra: dict[str, Any] = {}
"""


def test_measure_code_counts_each_part(tmp_path):
    files = {
        "configs/schema.py": SCHEMA,
        "run.py": "def long(a, b, c, d, e, f, g, h):\n" + "    pass\n" * 40,
        "tests/test_run.py": "x = 1\n",
        "README.md": "four words are here\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    MEASURE(root=tmp_path, json=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    core = figures["core"]
    assert (core["files"], core["lines"], core["classes"], core["Any"]) == (2, 50, 2, 1)
    assert (core["functions over 40 lines"], core["functions over 50 lines"]) == (1, 0)
    assert core["functions with over 7 parameters"] == 1
    assert figures["tests"]["lines"] == 1
    assert figures["whole project"] == {"search keys": 4, "words of Markdown": 4}
