"""The benchmark of faults in a small form."""

import pytest
from search_process import figures_of


@pytest.mark.slow
def test_search_under_many_faults_ends_as_without_them(tmp_path):
    options = ("--candidates=32", "--seed=1", "--pause=1")
    found = figures_of("soak.py", tmp_path, *options, timeout=1800)
    assert found["journal_identical"]
    assert (found["lost"], found["workers_left"]) == (0, 0)
    kinds = {"worker killed", "worker stopped", "node removed", "driver killed"}
    assert set(found["faults"]) >= kinds
