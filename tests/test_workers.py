"""The Ray pool: faults become outcomes or one line, never a hang."""

import pytest
import ray
import torch

from search import workers
from search.fitness import Setup
from search.population import Candidate
from search.workers import RayPool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup():
    windows = {
        role: torch.arange(3, 67).reshape(2, 32)
        for role in ("calibration", "fitness", "selection", "report")
    }
    return Setup("embedded", "float32", "cpu", 1, windows, 0.5, None, (), 0.1, 100.0)


@pytest.fixture(scope="module")
def pool(setup):
    made = RayPool(setup, "local", 1, 1, 0)
    made.share_statistics(made.call("collect_statistics"))
    yield made
    made.close()


def outcomes_of(pool, count):
    found = {}
    for _ in range(600):
        if came := pool.next_outcome():
            found[came[0]] = came[1]
        if len(found) == count:
            return found
    raise AssertionError(f"only {sorted(found)} came")


def test_every_candidate_gets_one_outcome(pool):
    for index in range(6):
        pool.submit(Candidate(index, "mul(W, G)" if index % 2 else "sub(W, W)", "row"))
    found = outcomes_of(pool, 6)
    assert {found[i].kind for i in (1, 3, 5)} == {"evaluated"}
    assert {found[i].kind for i in (0, 2, 4)} == {"degenerate"}
    assert found[1] == found[3] == found[5]


def test_a_killed_worker_delays_its_candidate_and_does_not_change_it(pool):
    pool.submit(Candidate(0, "mul(W, sqrt(X))", "row"))
    before = outcomes_of(pool, 1)[0]
    pool.submit(Candidate(1, "mul(W, sqrt(X))", "row"))
    for actor in list(pool._actors):
        ray.kill(actor)
    assert outcomes_of(pool, 1)[1] == before


def test_a_worker_with_other_code_is_refused_in_one_line(setup, pool, monkeypatch):
    monkeypatch.setattr(workers, "_connect", lambda *arguments: None)
    monkeypatch.setattr(workers, "code_digest", lambda: "another")
    with pytest.raises(ValueError, match="this worker runs other code than the driver") as error:
        RayPool(setup, "local", 1, 1, 0)
    assert "\n" not in str(error.value)
