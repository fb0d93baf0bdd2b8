"""The pool on a real Ray: workers are killed, stopped and starved, nodes come and go."""

import importlib
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import held_worker
import psutil
import pytest
import torch
from held_worker import HeldWorker
from small_search import arrivals_of, brief, embedded_setup, outcomes_of
from toy_models import toy_model

from pruning.criterion import Criterion
from pruning.masks import NOfM
from pruning.models import linear_layers
from search.fitness import Evaluator, Task
from search.pool import on_ray, worker_pool
from search.pool.cluster import connection, ray
from search.pool.jobs import MOST
from search.pool.on_ray import RayCrew
from search.pool.protocol import LossRequest, MaskRequest, PoolError
from search.pool.worker_pool import WorkerPool
from search.population import Candidate
from search.resident import Memory, Subject

pytestmark = pytest.mark.fire

# After `search.pool.cluster`, which keeps Ray on the loopback interface when it is imported.
Cluster = importlib.import_module("ray.cluster_utils").Cluster

WANDA, SNIP = Criterion.parse("mul(W, sqrt(X))", "row"), Criterion.parse("mul(W, G)", "model")
HERE = Path(__file__).parent
NODE = {"object_store_memory": 200 << 20, "include_dashboard": False}


@contextmanager
def cluster_of(orders, **head):
    """Run a cluster of one machine, whose workers take orders, and connect to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(held_worker.FOLDER, str(orders))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(on_ray, "_Worker", HeldWorker)
        made = Cluster(initialize_head=True, head_node_args={**NODE, **head})
        try:
            with connection(made.address, 1) as made.connected:
                yield made
        finally:
            made.shutdown()


@contextmanager
def pool_of(cluster, setup, workers=None, gpus=0.0, ships=True, wait=60.0):
    """Open a pool; its workers are dismissed at the end, so that the next has their place."""
    crew = RayCrew(cluster.connected, setup, 1, gpus, ships)
    try:
        yield WorkerPool(crew, setup, workers, wait, 120.0)
    finally:
        for worker in list(crew._actors):
            crew.dismiss(worker)


class Orders:
    """What workers are ordered to do, and what they say that they do."""

    def __init__(self, folder):
        self.folder = folder

    def give(self, *orders):
        for order in orders:
            (self.folder / order).touch()

    def withdraw(self, *orders):
        for order in orders:
            (self.folder / order).unlink()

    def doers(self, name):
        """Return the processes that were given a candidate or a method, in order."""
        return [pid for other, pid, _ in self._lines() if other == name]

    def memory(self, name):
        """Return what a process had for itself when it was last given something, MiB."""
        return {pid: own for other, pid, own in self._lines() if other == name}

    def _lines(self):
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(name, int(pid), int(own)) for name, pid, own in map(str.split, lines)]

    def wait_for(self, pool, name, count=1):
        """Let the pool go on until so many processes were given something; return the last."""
        return until(pool, lambda: self.doers(name)[count - 1 :])[0]


def until(pool, condition, seconds=120):
    """Let the pool go on until a condition holds; return what it says."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, (pool.staff, condition)
        assert pool.next_outcome() is None
    return found


def until_arrival(pool, seconds=120):
    deadline = time.monotonic() + seconds
    while not (arrival := pool.next_outcome()):
        assert time.monotonic() < deadline, pool.staff
    return arrival


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def setup():
    """Return what builds a worker with two models of unlike dtypes."""
    one = embedded_setup()
    short = {role: tokens[:, :16] for role, tokens in one.windows[0].items()}
    return replace(
        one,
        subjects=(*one.subjects, Subject("embedded", "bfloat16")),
        windows=(*one.windows, short),
        tasks=(Task("half", 0, 0.5, None, 1.0), Task("2:4", 1, 0.5, NOfM(2, 4), 2.0)),
    )


@pytest.fixture(scope="module")
def here(setup):
    """Return an evaluator in this process: what every worker must agree with."""
    evaluator = Evaluator(setup)
    for subject in range(2):
        evaluator.use_statistics(subject, evaluator.collect_statistics(subject))
    return evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="module")
def two_cores(folder):
    with cluster_of(folder, num_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_pool(two_cores, setup):
    with pool_of(two_cores, setup) as pool:
        brief(pool, setup)
        yield pool


@pytest.fixture
def orders(folder):
    for path in folder.iterdir():
        path.unlink()
    return Orders(folder)


@pytest.fixture
def pool(shared_pool, orders):
    """Return a pool of two workers that wait."""
    until(shared_pool, lambda: shared_pool.staff.ready == 2)
    return shared_pool


def faults_since(pool, before):
    return {k: n - before.get(k, 0) for k, n in pool.staff.faults.items() if n > before.get(k, 0)}


# What workers return


def test_workers_give_what_an_evaluator_in_this_process_gives(pool, here):
    same = [Candidate(index, SNIP if index % 2 else WANDA) for index in range(6)]
    constant = Candidate(6, Criterion.parse("sub(W, W)", "row"))
    outcomes = outcomes_of(pool, [*same, constant])
    assert outcomes == [here.evaluate(candidate) for candidate in [*same, constant]]
    assert (outcomes[0].tokens, outcomes[6].kind) == (2 * 32 + 2 * 16, "degenerate")
    requests = [LossRequest(task, "report", SNIP) for task in (1, 0)]
    assert pool.losses(requests) == [here.losses(task, "report", SNIP) for task in (1, 0)]
    assert pool.zeros_and_overlap([MaskRequest(0, WANDA, SNIP)]) == [
        here.zeros_and_overlap(0, WANDA, SNIP)
    ]
    assert [pool.model_digest(subject) for subject in range(2)] == list(here.digests)
    probe, expected = pool.probe_tensors(1), here.probe_tensors(1)
    assert probe.keys() == expected.keys()
    assert all(torch.equal(probe[key], expected[key]) for key in probe)


def test_timings_tell_seconds_peak_memory_and_worker(pool):
    (arrival,) = arrivals_of(pool, [Candidate(0, WANDA)])
    assert list(arrival.timing) == ["seconds", "peak_mib", "worker"]
    assert 0 < arrival.timing["seconds"] < 60
    assert arrival.timing["peak_mib"] > 50


def test_a_wrong_value_in_a_call_is_one_line(pool):
    with pytest.raises(ValueError, match=r"^a worker failed in losses: ValueError: ") as error:
        pool.losses([LossRequest(0, "report", Criterion(WANDA.metric, "none"))])
    assert "\n" not in str(error.value)


# Workers that are killed, stopped and starved


def test_a_candidate_whose_workers_are_killed_again_and_again_has_its_outcome(pool, here, orders):
    before = dict(pool.staff.faults)
    orders.give("hold-0")
    pool.submit(Candidate(0, WANDA))
    for count in range(1, 5):
        os.kill(orders.wait_for(pool, "0", count), signal.SIGKILL)
    orders.wait_for(pool, "0", 5)
    orders.withdraw("hold-0")
    assert until_arrival(pool).outcome == here.evaluate(Candidate(0, WANDA))
    assert len(set(orders.doers("0"))) == 5
    assert faults_since(pool, before) == {"lost": 4}


def test_a_candidate_that_kills_every_worker_fails_while_others_do_not(
    pool, here, orders, monkeypatch
):
    monkeypatch.setitem(MOST, "lost", 3)
    before = dict(pool.staff.faults)
    orders.give("kill-1")
    candidates = [Candidate(index, WANDA if index < 4 else SNIP) for index in range(8)]
    outcomes = outcomes_of(pool, candidates)
    times = MOST["lost"]
    assert outcomes[1].kind == "failed"
    assert outcomes[1].reason == (
        f"ended every worker that it was given to, {times} of {times}: "
        "its process or its node was lost"
    )
    others = [candidate for candidate in candidates if candidate.index != 1]
    assert [outcomes[c.index] for c in others] == [here.evaluate(c) for c in others]
    assert len(set(orders.doers("1"))) == times
    assert faults_since(pool, before) == {"lost": times}


def test_a_stopped_worker_is_ended_and_its_candidate_tried_elsewhere(
    pool, here, orders, monkeypatch
):
    monkeypatch.setattr(worker_pool, "GRACE", 2.0)
    monkeypatch.setattr(worker_pool, "FACTOR", 0.0)
    before = dict(pool.staff.faults)
    orders.give("hold-0")
    pool.submit(Candidate(0, WANDA))
    stopped = orders.wait_for(pool, "0")
    os.kill(stopped, signal.SIGSTOP)
    orders.withdraw("hold-0")
    assert until_arrival(pool).outcome == here.evaluate(Candidate(0, WANDA))
    assert faults_since(pool, before) == {"late": 1}
    until(pool, lambda: is_gone(stopped), 20)


def test_a_worker_whose_device_is_broken_for_good_is_replaced(pool, here, orders):
    before = dict(pool.staff.faults)
    orders.give("break-0")
    candidates = [Candidate(index, WANDA) for index in range(6)]
    assert outcomes_of(pool, candidates) == [here.evaluate(candidate) for candidate in candidates]
    assert faults_since(pool, before) == {"exhausted": 1}
    broken, other = orders.doers("0")
    assert broken != other
    until(pool, lambda: is_gone(broken), 20)


def test_a_worker_that_is_killed_while_it_waits_is_replaced_and_no_candidate_is_charged(
    pool, orders
):
    before = dict(pool.staff.faults)
    until(pool, lambda: len(set(orders.doers("ping"))) == 2)
    os.kill(orders.doers("ping")[-1], signal.SIGKILL)
    until(pool, lambda: faults_since(pool, before) == {"lost": 1}, 10)
    until(pool, lambda: pool.staff.ready == 2)


@pytest.mark.parametrize("method", ["collect_statistics", "probe_tensors", "losses"])
def test_a_call_whose_worker_is_killed_is_done_again(pool, here, orders, method):
    orders.give(f"hold-{method}")

    def kill():
        while not orders.doers(method):
            time.sleep(0.02)
        os.kill(orders.doers(method)[0], signal.SIGKILL)
        orders.withdraw(f"hold-{method}")

    killer = threading.Thread(target=kill)
    killer.start()
    if method == "losses":
        assert pool.losses([LossRequest(0, "report", WANDA)]) == [here.losses(0, "report", WANDA)]
    else:
        found, expected = getattr(pool, method)(0), getattr(here, method)(0)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    killer.join()
    assert len(orders.doers(method)) == 2


# Nodes that come and go


@pytest.fixture
def one_model(tmp_path):
    setup = embedded_setup()
    evaluator = Evaluator(setup)
    evaluator.use_statistics(0, evaluator.collect_statistics(0))
    return setup, [evaluator.evaluate(Candidate(index, WANDA)) for index in range(2)]


def test_the_pool_grows_and_shrinks_with_the_cluster(tmp_path, one_model):
    setup, expected = one_model
    orders = Orders(tmp_path)
    with cluster_of(tmp_path, num_cpus=0) as cluster, pool_of(cluster, setup) as pool:
        assert pool.next_outcome() is None
        assert (pool.staff.ready, pool.staff.starting) == (0, 0)
        first = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        brief(pool, setup)
        until(pool, lambda: pool.staff.ready == 1)
        second = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        until(pool, lambda: pool.staff.ready == 2)
        orders.give("hold-0", "hold-1")
        for index in range(2):
            pool.submit(Candidate(index, WANDA))
        until(pool, lambda: orders.doers("0") and orders.doers("1"))
        cluster.remove_node(second)
        until(pool, lambda: pool.staff.ready == 1)
        orders.withdraw("hold-0", "hold-1")
        arrivals = [until_arrival(pool) for _ in range(2)]
        assert {arrival.index: arrival.outcome for arrival in arrivals} == dict(enumerate(expected))
        assert pool.staff.starting == 0
        assert pool.staff.faults == {"lost": 1}
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        until(pool, lambda: pool.staff.ready == 2)
        cluster.remove_node(first)
        assert outcomes_of(pool, [Candidate(2, WANDA)])[0] == expected[0]


def test_without_any_node_the_pool_gives_up_in_time(tmp_path, one_model):
    setup, _ = one_model
    with cluster_of(tmp_path, num_cpus=0) as made, pool_of(made, setup, wait=3.0) as pool:
        began = time.monotonic()
        with pytest.raises(PoolError, match=r"no worker for 3 s \(ray.wait_seconds\)"):
            pool.model_digest(0)
        assert 3 < time.monotonic() - began < 10


def test_a_cluster_that_is_full_is_waited_for_and_no_longer(tmp_path, one_model):
    setup, _ = one_model

    @ray.remote(num_cpus=1)
    class Other:
        def ready(self):
            return True

    with cluster_of(tmp_path, num_cpus=1) as made, pool_of(made, setup, wait=5.0) as pool:
        other = Other.remote()
        assert ray.get(other.ready.remote())
        with pytest.raises(PoolError, match="no worker for 5 s"):
            pool.model_digest(0)
        ray.kill(other)


def test_a_fraction_that_does_not_divide_a_node_leaves_no_worker_waiting(tmp_path, one_model):
    setup, _ = one_model
    # Three of 0.6 fit two GPUs by their sum, and two in truth.
    with (
        cluster_of(tmp_path, num_cpus=4, num_gpus=2) as made,
        pool_of(made, setup, gpus=0.6) as pool,
    ):
        until(pool, lambda: pool.staff.ready == 2)
        for _ in range(10):
            pool.next_outcome()
        assert (pool.staff.ready, pool.staff.starting) == (2, 0)


def test_workers_that_rays_memory_monitor_ends_are_replaced(tmp_path, one_model, monkeypatch):
    setup, expected = one_model
    orders = Orders(tmp_path)
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (2 << 30)) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{limit:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with cluster_of(tmp_path, num_cpus=2) as made, pool_of(made, setup) as pool:
        brief(pool, setup)
        orders.give("eat-0")
        assert outcomes_of(pool, [Candidate(index, WANDA) for index in range(2)]) == expected
        assert len(orders.doers("0")) > 1
        assert set(pool.staff.faults) == {"crowded"}
        assert "lacked memory" in pool.staff.trouble


def test_workers_that_cannot_start_again_end_the_run_and_blame_no_candidate(tmp_path):
    folder = tmp_path / "model"
    toy_model("llama", vocab_size=256).save_pretrained(folder)
    setup = replace(embedded_setup(), subjects=(Subject(str(folder), "float32"),))
    orders = Orders(tmp_path)
    with cluster_of(tmp_path, num_cpus=1) as made, pool_of(made, setup, ships=False) as pool:
        brief(pool, setup)
        orders.give("hold-0")
        pool.submit(Candidate(0, WANDA))
        worker = orders.wait_for(pool, "0")
        folder.rename(tmp_path / "elsewhere")
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(PoolError, match=r"no worker could be started, 3 times; .*/model"):
            until(pool, lambda: False)


# What workers share


@pytest.mark.parametrize("ships", [True, False])
def test_a_further_worker_costs_its_pruned_copy_and_little_else(tmp_path, ships):
    folder = tmp_path / "model"
    model = toy_model(
        "llama", vocab_size=256, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4
    )
    pruned_copy = sum(layer.weight.nbytes for layer in linear_layers(model).values()) >> 20
    model.save_pretrained(folder)
    del model
    setup = replace(
        embedded_setup(),
        subjects=(Subject(str(folder), "float32"),),
        leaves=frozenset("XGM"),
        memory=Memory(scores="recompute"),
    )
    orders = Orders(tmp_path / str(ships))
    orders.folder.mkdir()
    cores = {"num_cpus": 2, "object_store_memory": 1 << 30}
    with (
        cluster_of(orders.folder, **cores) as made,
        pool_of(made, setup, ships=ships) as pool,
    ):
        brief(pool, setup)
        until(pool, lambda: pool.staff.ready == 2)
        outcomes_of(pool, [Candidate(index, SNIP) for index in range(8)])
        until(pool, lambda: set(orders.doers("ping")) == set(orders.doers("start")))
        libraries, now = orders.memory("start"), orders.memory("ping")
    own = {pid: now[pid] - libraries[pid] for pid in now}
    assert len(own) == 2
    # As large as that each: weights, dense copy, and two matrices of statistics.
    assert all(pruned_copy <= size < 1.5 * pruned_copy for size in own.values()), own
