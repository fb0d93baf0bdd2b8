"""A search under faults ends as without them; `benchmarks/soak.py` in its small form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {"worker killed", "worker stopped", "node removed", "driver killed"}


@pytest.mark.slow
def test_search_under_faults_ends_as_without_them(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--json", str(figures)]
    command += ["--candidates=80", "--seed=1", "--pause=1", "--minutes=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["journal_identical"]
    assert found["lost"] == 0
    assert set(found["faults"]) >= KINDS
    assert found["workers_left"] == 0
