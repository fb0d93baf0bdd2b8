"""A model from the hub is pruned, recorded and repeated, and searched on, at one commit."""

import json
import sys

import pytest
import yaml
from hub_cache import FIRST, SECOND
from search_process import ROOT, run

SMALL = [
    *("model=owner/tiny", "ray.workers=0", "search.population=4", "search.stages=[1]"),
    *("fitness.windows=3", "fitness.length=16", "calibration.windows=2", "calibration.length=16"),
    *("selection.windows=3", "selection.length=16", "selection.model=owner/tiny"),
    *("report.windows=3", "report.length=16"),
]

pytestmark = pytest.mark.slow


def printed(script, *options):
    """Run a script to its end and return all that it prints."""
    done = run([sys.executable, str(ROOT / script), *map(str, options)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_recipe_repeats_the_commit_it_was_made_from(hub_cache, tmp_path):
    hub_cache.point_main_at(FIRST)
    small = ["--metric", "magnitude", "--seqlen", 16, "--eval-windows", 2]
    printed("run_prune.py", "--model", "owner/tiny", *small, "--out", tmp_path / "made")
    recipe = tmp_path / "made/pruning_recipe.json"
    assert json.loads(recipe.read_text(encoding="utf-8"))["revision"] == FIRST

    hub_cache.point_main_at(SECOND)
    again = ["run_prune.py", "--recipe", recipe, "--out"]
    assert "all files match the recipe's" in printed(*again, tmp_path / "again")
    other = printed(*again, tmp_path / "other", "--revision", "main")
    assert "files differ from the recipe's" in other


def test_resume_is_on_the_commit_that_it_began_with(hub_cache, tmp_path):
    out = tmp_path / "run"
    hub_cache.point_main_at(FIRST)
    settings = [f"--set={setting}" for setting in [*SMALL, "search.candidates=4"]]
    # The command that applies the metric names it.
    assert f"--model owner/tiny@{FIRST}" in printed("run_search.py", "--out", out, *settings)
    config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"] == f"owner/tiny@{FIRST}"
    assert config["selection"]["model"] == [f"owner/tiny@{FIRST}"]

    hub_cache.point_main_at(SECOND)
    more = ["--resume", out, "--set", "search.candidates=6"]
    assert "candidate 6/6" in printed("run_search.py", *more)
