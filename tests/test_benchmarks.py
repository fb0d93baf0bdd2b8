"""Benchmarks that no other test runs, in a small form."""

import json
import sys

import pytest
from search_process import ROOT, run

pytestmark = pytest.mark.slow


def test_a_driver_that_breeds_and_tunes_feeds_workers_that_sleep(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--json", str(figures)]
    done = run([*command, "--only=16 x 2 s, even", "--seconds=4"], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = json.loads(figures.read_text())["cases"].values()
    assert case["candidates"] > 10 and 0 < case["busy"] <= 1
