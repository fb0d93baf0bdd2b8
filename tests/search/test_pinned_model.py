"""A search on a model from the hub keeps to the commit that it began with."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_cache import FIRST, SECOND

ROOT = Path(__file__).parents[2]
SMALL = [
    *("model=owner/tiny", "ray.workers=0", "search.population=4", "search.stages=[1]"),
    *("fitness.windows=3", "fitness.length=16", "calibration.windows=2", "calibration.length=16"),
    *("selection.windows=3", "selection.length=16", "selection.model=owner/tiny"),
    *("report.windows=3", "report.length=16"),
]


def search(*options: object) -> str:
    command = [sys.executable, ROOT / "run_search.py", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_resume_is_on_the_commit_that_it_began_with(hub_cache, tmp_path):
    run = tmp_path / "run"
    hub_cache.point_main_at(FIRST)
    settings = [f"--set={setting}" for setting in [*SMALL, "search.candidates=4"]]
    printed = search("--out", run, *settings)
    assert f"--model owner/tiny@{FIRST}" in printed  # of the command that applies the metric
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"] == f"owner/tiny@{FIRST}"
    assert config["selection"]["model"] == [f"owner/tiny@{FIRST}"]

    hub_cache.point_main_at(SECOND)
    assert "candidate 6/6" in search("--resume", run, "--set", "search.candidates=6")
