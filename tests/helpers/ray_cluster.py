"""A Ray cluster on this machine whose workers take orders, and a pool on it."""

import importlib
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from held_worker import FOLDER, HeldWorker
from toy_setup import quiet_pool

from prunevolve.configs.schema import Ray
from prunevolve.search.pool.cluster import SETTINGS, connected

HERE = Path(__file__).parent
NODE = {"object_store_memory": 200 << 20, "include_dashboard": False}


@contextmanager
def cluster_of(orders, **head):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(orders))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parents[1]), str(HERE)]))
        # At Ray's default niceness workers starve while other tests are busy.
        for name, value in (SETTINGS | {"RAY_worker_niceness": "0"}).items():
            patch.setenv(name, value)
        cluster_utils = importlib.import_module("ray.cluster_utils")
        made = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, **head})
        try:
            yield made
        finally:
            made.shutdown()


@contextmanager
def pool_of(cluster, setup, **ray):
    config = Ray(address=cluster.address, wait_seconds=120.0, start_seconds=120.0, **ray)
    setup = replace(setup, config=setup.config.model_copy(update={"ray": config}))
    with connected(config) as head:
        # It imports Ray, which reads the environment then.
        from prunevolve.search.pool.on_ray import RayBackend

        with RayBackend.opened(head, setup, HeldWorker) as backend:
            yield quiet_pool(backend, setup)


class Orders:
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
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(pid) for other, pid in map(str.split, lines) if other == name]


def until(pool, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, (pool.workers, condition)
        assert pool.next_done() is None
    return found


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
