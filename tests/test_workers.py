"""The Ray pool: faults become outcomes or one line, never a hang."""

import pytest
import ray
import torch
from search.workers import RayPool

from pruning.masks import NOfM
from search import workers
from search.fitness import Evaluator, Setup, Task
from search.population import Candidate
from search.resident import Subject

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup():
    windows = {
        role: torch.arange(3, 67).reshape(2, 32)
        for role in ("calibration", "fitness", "selection", "report")
    }
    return Setup(
        subjects=(Subject("embedded", "float32"), Subject("embedded", "bfloat16")),
        windows=(windows, {role: tokens[:, :16] for role, tokens in windows.items()}),
        tasks=(Task("half", 0, 0.5, None, 1.0), Task("2:4", 1, 0.5, NOfM(2, 4), 2.0)),
        leaves=frozenset("XG"),
        objective="nll",
        device="cpu",
        threads=1,
        stages=(),
        slack=0.1,
        hopeless=100.0,
    )


@pytest.fixture(scope="module")
def pool(setup):
    made = RayPool(setup, "local", 1, 1, 0)
    for subject in range(2):
        made.share_statistics(subject, made.call("collect_statistics", subject))
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


def test_a_worker_gives_what_an_evaluator_in_this_process_gives(pool, setup):
    here = Evaluator(setup)
    for subject in range(2):
        here.collect_statistics(subject)
    candidate = Candidate(0, "mul(W, G)", "model")
    pool.submit(candidate)
    outcome = outcomes_of(pool, 1)[0]
    assert outcome == here.evaluate(candidate)
    assert outcome.tokens == 2 * 32 + 2 * 16
    calls = [(task, "report", "mul(W, G)", "row") for task in (1, 0)]
    assert pool.call_each("losses", calls) == [here.losses(*call) for call in calls]
    masks = (0, ("W", "row"), ("mul(W, G)", "model"))
    assert pool.call("zeros_and_overlap", *masks) == here.zeros_and_overlap(*masks)
    assert pool.call("model_digest", 1) == here.model_digest(1)


def test_timings_tell_seconds_peak_memory_and_worker(pool):
    pool.submit(Candidate(5, "W", "row"))
    outcomes_of(pool, 1)
    timing = pool.timings[5]
    assert list(timing) == ["seconds", "peak_mib", "worker"]
    assert 0 < timing["seconds"] < 60
    assert timing["peak_mib"] > 50
    assert timing["worker"] == 0


def test_a_failed_call_is_one_line(pool):
    with pytest.raises(ValueError, match="a worker failed in losses: ") as error:
        pool.call("losses", 9, "report", None, "row")
    assert "\n" not in str(error.value)


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
