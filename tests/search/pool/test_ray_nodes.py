"""The pool on a real Ray whose nodes come and go, are full, lack memory or a model."""

from dataclasses import replace

import psutil
import pytest
from ray_cluster import Orders, cluster_of, next_outcome, pool_of, until
from toy_models import toy_model
from toy_setup import SNIP, WANDA, brief, embedded_setup, made_of, outcomes_of

from prunevolve.pruning.models import linear_layers
from prunevolve.search.pool import workers as workers
from prunevolve.search.records import Candidate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_model():
    setup = embedded_setup()
    return setup, made_of(setup).evaluate(Candidate(0, WANDA))


def test_pool_grows_and_shrinks_with_the_cluster(tmp_path, one_model):
    setup, expected = one_model
    orders = Orders(tmp_path)
    with cluster_of(tmp_path, num_cpus=0) as cluster, pool_of(cluster, setup) as pool:
        assert pool.next_done() is None
        assert (pool.workers.ready, pool.workers.starting) == (0, 0)
        first = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
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
        assert [next_outcome(pool) for _ in range(2)] == [expected, expected]
        until(pool, lambda: pool.workers.starting == 0)
        assert pool.workers.faults == {"lost": 1}
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        until(pool, lambda: pool.workers.ready == 2)
        cluster.remove_node(first)
        assert outcomes_of(pool, [Candidate(2, WANDA)]) == [expected]


def test_gpu_fraction_that_does_not_divide_a_node_leaves_no_worker_waiting(tmp_path, one_model):
    setup, _ = one_model
    # Three of 0.6 fit two GPUs by their sum, and two in truth.
    with (
        cluster_of(tmp_path, num_cpus=4, num_gpus=2) as made,
        pool_of(made, setup, gpus_per_worker=0.6) as pool,
    ):
        until(pool, lambda: pool.workers.ready == 2)
        for _ in range(10):
            pool.next_done()
        assert (pool.workers.ready, pool.workers.starting) == (2, 0)


def test_workers_that_rays_memory_monitor_ends_are_replaced(tmp_path, one_model, monkeypatch):
    setup, expected = one_model
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


def test_further_worker_costs_its_pruned_copy_and_little_else(tmp_path):
    folder = tmp_path / "model"
    model = toy_model(
        "llama", vocab_size=256, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4
    )
    pruned_copy = sum(layer.weight.nbytes for layer in linear_layers(model).values()) >> 20
    model.save_pretrained(folder)
    del model
    setup = embedded_setup("low_memory=true", terminals="XGM")
    (subject,) = setup.subjects
    windows = {r: replace(text, tokens=text.tokens % 256) for r, text in subject.windows.items()}
    setup = replace(setup, subjects=(replace(subject, model=str(folder), windows=windows),))
    orders = Orders(tmp_path)
    with (
        cluster_of(tmp_path, num_cpus=0) as made,  # for its environment
        pool_of(made, setup, address="local", workers=2) as pool,
    ):
        brief(pool, setup)
        until(pool, lambda: pool.workers.ready == 2)
        outcomes_of(pool, [Candidate(index, SNIP) for index in range(6)])
        orders.give("hold-8", "hold-9")
        for index in (8, 9):
            pool.submit(Candidate(index, SNIP))
        orders.wait_for(pool, "8")
        orders.wait_for(pool, "9")
    libraries, now = orders.memory("arrive"), orders.memory("8") | orders.memory("9")
    own = {pid: now[pid] - libraries[pid] for pid in now}
    assert len(own) == 2
    # As large as that each: weights, dense copy, and two matrices of statistics. The rest is what
    # the largest layer's score and its parts take, 1.6 to 2.1 copies with the pruned one, by what
    # the allocator has given back; one more copy would make at least 2.5 of it.
    assert all(pruned_copy <= size < 2.4 * pruned_copy for size in own.values()), own
