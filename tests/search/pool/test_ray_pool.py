"""The pool on a real Ray: its two workers are killed, stopped and broken."""

import os
import signal

import pytest
from ray_cluster import Orders, cluster_of, is_gone, next_outcome, pool_of, until
from toy_models import assert_same_tensors
from toy_setup import SNIP, WANDA, brief, embedded_setup, jobs_of, made_of, outcomes_of

from prunevolve.pruning.metric import Criterion
from prunevolve.search.fingerprint import tensors_digest
from prunevolve.search.pool import workers as workers
from prunevolve.search.records import Candidate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup():
    """Return what builds a worker with two models of unlike dtypes."""
    return embedded_setup("tasks=[{}, {dtype: bfloat16, pattern: '2:4', weight: 2}]")


@pytest.fixture(scope="module")
def here(setup):
    """Return an evaluator in this process: what every worker must agree with."""
    return made_of(setup)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def shared_pool(folder, setup):
    with cluster_of(folder, num_cpus=2) as cluster, pool_of(cluster, setup) as pool:
        brief(pool, setup)
        yield pool


@pytest.fixture
def orders(folder):
    for path in folder.iterdir():
        path.unlink()
    return Orders(folder)


@pytest.fixture
def pool(shared_pool, orders):
    until(shared_pool, lambda: shared_pool.workers.ready == 2)
    return shared_pool


def faults_since(pool, before):
    return {k: n - before.get(k, 0) for k, n in pool.workers.faults.items() if n > before.get(k, 0)}


def test_workers_give_what_an_evaluator_in_this_process_gives(pool, here):
    same = [Candidate(index, SNIP if index % 2 else WANDA) for index in range(6)]
    constant = Candidate(6, Criterion.parse("sub(W, W)", "row"))
    jobs = jobs_of(pool, [*same, constant])
    outcomes = [job.outcome for job in jobs]
    assert outcomes == [here.evaluate(candidate) for candidate in [*same, constant]]
    assert (outcomes[0].tokens, outcomes[6].kind) == (2 * 32 + 2 * 32, "degenerate")
    assert list(jobs[0].timing) == ["seconds", "peak_mib", "worker"]
    wanted = [(task, "report", SNIP) for task in (1, 0)]
    known = pool.losses("losses", wanted)
    assert [known[one] for one in wanted] == [here.losses(*one) for one in wanted]
    masters = [resident.master for resident in here.residents]
    assert pool.workers.loaded.digests == tuple(map(tensors_digest, masters))
    probe, expected = pool.tensors("probe_tensors", 1), here.probe_tensors(1)
    assert_same_tensors(probe, expected)


def test_wrong_value_in_a_request_is_one_line(pool):
    line = r"^a worker failed in losses: ValueError: "
    with pytest.raises(ValueError, match=line) as error:
        pool.losses("losses", [(0, "report", Criterion(WANDA.metric, "none"))])
    assert "\n" not in str(error.value)


def test_candidate_whose_workers_are_killed_again_and_again_has_its_outcome(pool, here, orders):
    before = dict(pool.workers.faults)
    orders.give("hold-0")
    pool.submit(Candidate(0, WANDA))
    for count in (1, 2):
        os.kill(orders.wait_for(pool, "0", count), signal.SIGKILL)
    orders.wait_for(pool, "0", 3)
    orders.withdraw("hold-0")
    assert next_outcome(pool) == here.evaluate(Candidate(0, WANDA))
    assert len(set(orders.doers("0"))) == 3
    assert faults_since(pool, before) == {"lost": 2}


def test_stopped_worker_is_ended_and_its_candidate_tried_elsewhere(pool, here, orders, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 5.0)
    monkeypatch.setattr(workers, "FACTOR", 0.0)
    before = dict(pool.workers.faults)
    orders.give("hold-0")
    pool.submit(Candidate(0, WANDA))
    stopped = orders.wait_for(pool, "0")
    os.kill(stopped, signal.SIGSTOP)
    orders.withdraw("hold-0")
    assert next_outcome(pool) == here.evaluate(Candidate(0, WANDA))
    # On a slow machine a healthy worker may take longer than that, too, and is replaced.
    assert faults_since(pool, before).keys() == {"timeout"}
    until(pool, lambda: is_gone(stopped), 20)


def test_worker_whose_device_is_broken_for_good_is_replaced(pool, here, orders):
    before = dict(pool.workers.faults)
    orders.give("break-0")
    candidates = [Candidate(index, WANDA) for index in range(6)]
    assert outcomes_of(pool, candidates) == [here.evaluate(candidate) for candidate in candidates]
    assert faults_since(pool, before) == {"out of memory": 1}
    broken, other = orders.doers("0")
    assert broken != other
    until(pool, lambda: is_gone(broken), 20)
