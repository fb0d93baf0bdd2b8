"""The pool of one worker that is this process: what a search asks for and what it gets."""

import pytest
from toy_setup import CONSTANT, MAGNITUDE, SNIP, WANDA, made_of, setup_of

from search.pool.in_process import InProcessCrew
from search.pool.protocol import LossRequest, MaskRequest
from search.pool.worker_pool import WorkerPool
from search.population import Candidate


@pytest.fixture(scope="module")
def evaluator():
    return made_of(setup_of())


@pytest.fixture(scope="module")
def pool(evaluator):
    """A pool with the evaluator's statistics."""
    pool = WorkerPool(InProcessCrew(evaluator.setup), evaluator.setup, 1, 60, 60)
    pool.use_statistics(0, evaluator.residents[0].statistics.to_tensors())
    return pool


def arrivals(pool, count):
    """Wait for some outcomes, in the order in which they come."""
    found = []
    while len(found) < count:
        if arrival := pool.next_outcome():
            found.append(arrival)
    return found


def test_outcomes_come_in_order_and_are_the_evaluators(pool, evaluator):
    assert pool.next_outcome() is None
    candidates = [Candidate(0, MAGNITUDE), Candidate(1, SNIP)]
    for candidate in candidates:
        pool.submit(candidate)
    found = arrivals(pool, 2)
    assert [arrival.index for arrival in found] == [0, 1]
    assert [arrival.outcome for arrival in found] == list(map(evaluator.evaluate, candidates))
    assert pool.next_outcome() is None


def test_an_outcome_comes_with_seconds_peak_memory_and_worker(pool):
    pool.submit(Candidate(7, MAGNITUDE))
    (arrival,) = arrivals(pool, 1)
    assert arrival.index == 7
    assert list(arrival.timing) == ["seconds", "peak_mib", "worker"]
    assert 0 < arrival.timing["seconds"] < 60
    assert arrival.timing["peak_mib"] > 50  # torch alone is more


def test_requests_are_answered_in_order(pool, evaluator):
    losses = [LossRequest(0, "report", None), LossRequest(0, "fitness", CONSTANT)]
    assert pool.losses(losses) == [evaluator.losses(0, "report", None), None]
    masks = [MaskRequest(0, MAGNITUDE, WANDA), MaskRequest(0, WANDA, WANDA)]
    expected = [evaluator.zeros_and_overlap(0, one, WANDA) for one in (MAGNITUDE, WANDA)]
    assert expected[0] != expected[1]
    assert pool.zeros_and_overlap(masks) == expected


def test_statistics_probe_and_digest_are_the_evaluators(pool, evaluator):
    statistics = evaluator.residents[0].statistics.to_tensors()
    collected = pool.collect_statistics(0)
    assert collected.keys() == statistics.keys()
    assert all((collected[name] == statistics[name]).all() for name in statistics)
    assert pool.probe_tensors(0).keys() == evaluator.probe_tensors(0).keys()
    assert pool.model_digest(0) == evaluator.digests[0]
