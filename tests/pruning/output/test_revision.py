"""A model from the hub is pruned, recorded and repeated at one commit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import FIRST, SECOND

ROOT = Path(__file__).parents[3]


@pytest.fixture
def prune(hub_cache):
    """Run the program on a hub that is only a cache: owner/tiny with two commits."""

    def run(main: str, *options: object) -> subprocess.CompletedProcess[str]:
        hub_cache.point_main_at(main)
        command = [sys.executable, ROOT / "run_prune.py", *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_recipe_repeats_the_commit_it_was_made_from(prune, tmp_path):
    small = ["--metric", "magnitude", "--seqlen", 16, "--eval-windows", 2]
    made = prune(FIRST, "--model", "owner/tiny", *small, "--out", tmp_path / "made")
    assert made.returncode == 0, made.stderr
    recipe = tmp_path / "made/pruning_recipe.json"
    assert json.loads(recipe.read_text(encoding="utf-8"))["revision"] == FIRST

    again = prune(SECOND, "--recipe", recipe, "--out", tmp_path / "again")
    assert "all files match the recipe's" in again.stdout, again.stdout + again.stderr

    other = prune(SECOND, "--recipe", recipe, "--revision", "main", "--out", tmp_path / "other")
    assert "files differ from the recipe's" in other.stdout + other.stderr
