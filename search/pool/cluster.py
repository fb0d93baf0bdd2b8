"""How a search connects to Ray (stub)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class LostCluster(RuntimeError):
    """lost"""


@dataclass(frozen=True)
class Capacity:
    whole: int
    free: int


@contextmanager
def connection(address: str, cpus: int) -> Iterator[None]:
    if address == "local":
        ray.init(
            address="local",
            num_cpus=cpus,
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def _fits(resources, cpus, gpus):
    return int(
        min(resources.get("CPU", 0) // cpus, resources.get("GPU", 0) // gpus if gpus else 10**6)
    )


def capacities(cpus: int, gpus: float) -> dict[str, Capacity]:
    free = ray._private.state.available_resources_per_node()
    return {
        node["NodeID"]: Capacity(
            _fits(node["Resources"], cpus, gpus), _fits(free.get(node["NodeID"], {}), cpus, gpus)
        )
        for node in ray.nodes()
        if node["Alive"]
    }


def on_node(node: str):
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def request_workers(workers: int, cpus: int, gpus: float) -> None:
    pass
