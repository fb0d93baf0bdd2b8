"""A search under many faults, in a file of its own, since it takes as long as many others."""

import json
import sys

import pytest
from search_process import ROOT, run

pytestmark = pytest.mark.slow


def test_search_under_many_faults_ends_as_without_them(tmp_path):
    """`benchmarks/soak.py` in its small form."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--json", str(figures)]
    command += ["--candidates=60", "--seed=1", "--pause=1", "--minutes=10"]
    done = run(command, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["journal_identical"]
    assert (found["lost"], found["workers_left"]) == (0, 0)
    kinds = {"worker killed", "worker stopped", "node removed", "driver killed"}
    assert set(found["faults"]) >= kinds
