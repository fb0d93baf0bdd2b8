"""A search under many faults, in a file of its own, since it takes as long as many others."""

import pytest
from search_process import figures_of

pytestmark = pytest.mark.slow


def test_search_under_many_faults_ends_as_without_them(tmp_path):
    """`benchmarks/soak.py` in its small form."""
    options = ("--candidates=60", "--seed=1", "--pause=1", "--minutes=10")
    found = figures_of("soak.py", tmp_path, *options, timeout=1800)
    assert found["journal_identical"]
    assert (found["lost"], found["workers_left"]) == (0, 0)
    kinds = {"worker killed", "worker stopped", "node removed", "driver killed"}
    assert set(found["faults"]) >= kinds
