"""The pool on a real Ray: what its workers give, and nodes that come, go and lack memory."""

import psutil
import pytest
from ray_cluster import Orders, cluster_of, is_gone, pool_of, until
from toy_models import assert_same_tensors
from toy_setup import SNIP, WANDA, brief, drive, embedded_setup, jobs_of, made_of, outcomes_of

from prunevolve.pruning.metric import Criterion
from prunevolve.search.fingerprint import tensors_digest
from prunevolve.search.pool import workers
from prunevolve.search.records import Candidate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setup():
    return embedded_setup("tasks=[{}, {dtype: bfloat16, pattern: '2:4', weight: 2}]")


@pytest.fixture(scope="module")
def here(setup):
    return made_of(setup)


@pytest.fixture(scope="module")
def expected(here):
    return here.evaluate(Candidate(0, WANDA))


def test_pool_grows_and_shrinks_with_the_cluster(tmp_path, setup, expected):
    orders = Orders(tmp_path)
    with cluster_of(tmp_path, num_cpus=0) as cluster, pool_of(cluster, setup) as pool:
        assert pool.next_done() is None
        assert (pool.workers.ready, pool.workers.starting) == (0, 0)
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        brief(pool, setup)
        until(pool, lambda: pool.workers.ready == 1)
        second = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        until(pool, lambda: pool.workers.ready == 2)
        orders.give("hold-0", "hold-1")
        for index in range(2):
            pool.submit(Candidate(index, WANDA))
        until(pool, lambda: orders.doers("0") and orders.doers("1"))
        cluster.remove_node(second)
        until(pool, lambda: pool.workers.ready == 1)
        orders.withdraw("hold-0", "hold-1")
        assert [job.outcome for job in drive(pool, 2).values()] == [expected, expected]
        until(pool, lambda: pool.workers.starting == 0)
        assert pool.workers.faults == {"lost": 1}


def test_gpu_fraction_that_does_not_divide_a_node_leaves_no_worker_waiting(tmp_path, setup):
    # Three of 0.6 fit two GPUs by their sum, and two in truth.
    with (
        cluster_of(tmp_path, num_cpus=4, num_gpus=2) as made,
        pool_of(made, setup, gpus_per_worker=0.6) as pool,
    ):
        until(pool, lambda: pool.workers.ready == 2)
        for _ in range(10):
            pool.next_done()
        assert (pool.workers.ready, pool.workers.starting) == (2, 0)


def test_workers_that_rays_memory_monitor_ends_are_replaced(tmp_path, setup, expected, monkeypatch):
    orders = Orders(tmp_path)
    memory = psutil.virtual_memory()
    # Far above what other tests may take meanwhile, and below what the order takes.
    limit = (memory.total - memory.available + (6 << 30)) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{limit:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    # A machine that gives out its memory slowly does not make the worker late.
    monkeypatch.setattr(workers, "GRACE", 110.0)
    with cluster_of(tmp_path, num_cpus=2) as made, pool_of(made, setup) as pool:
        brief(pool, setup)
        orders.give("eat-0")
        outcomes = outcomes_of(pool, [Candidate(index, WANDA) for index in range(2)])
        assert outcomes == [expected, expected]
        assert len(orders.doers("0")) > 1
        assert set(pool.workers.faults) == {"no memory on node"}
        assert "lacked memory" in pool.workers.trouble


# A pool that stays open from here on: a process has one Ray at a time


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    return Orders(tmp_path_factory.mktemp("orders"))


@pytest.fixture(scope="module")
def pool(orders, setup):
    with cluster_of(orders.folder, num_cpus=2) as cluster, pool_of(cluster, setup) as pool:
        brief(pool, setup)
        until(pool, lambda: pool.workers.ready == 2)
        yield pool


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
    ((_, probe),) = pool.tensors("probe_tensors", [1])
    assert_same_tensors(probe, here.probe_tensors(1))


def test_worker_whose_device_is_broken_for_good_is_replaced(pool, here, orders):
    orders.give("break-10")
    candidates = [Candidate(index, WANDA) for index in range(10, 16)]
    assert outcomes_of(pool, candidates) == [here.evaluate(candidate) for candidate in candidates]
    assert pool.workers.faults["out of memory"] == 1
    broken, other = orders.doers("10")
    assert broken != other
    until(pool, lambda: is_gone(broken), 20)
