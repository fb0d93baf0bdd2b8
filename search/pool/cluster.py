"""How a search connects to Ray: to a private instance, or to a running cluster.

A private Ray listens on the loopback interface only, requires a token that nobody else knows, and
disappears, folder included, when the search ends (`keeper.py`). A running cluster is probed first
(`address.py`). Once connected, threads watch the head and this machine's node, because Ray hangs
a driver that has lost them and kills it after a minute.
"""

import atexit
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import TimeoutError as CallTimeout
from multiprocessing.pool import ThreadPool
from typing import Any

from search.pool import address as addresses
from search.pool.keeper import LOOPBACK, own_ray
from search.pool.protocol import PoolError


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables (None unsets one), and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# Without the second variable, a call after shutdown starts another Ray.
with _environment({**LOOPBACK, "RAY_ENABLE_AUTO_CONNECT": "0"}):
    import ray as ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
    from ray.autoscaler.sdk import request_resources
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOCAL = "local"
EXIT_LOST = 3
"""The exit code of a process that lost its cluster: interrupted but resumable."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CONNECT_SECONDS = 30.0
_END_SECONDS = 5.0
_SILENCE_SECONDS = 10.0
_GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Capacity:
    """How many workers a node holds.

    Attributes:
        whole: On an empty node.
        free: In addition to everything running there now; an upper bound, some seconds old.
    """

    whole: int
    free: int


class LostCluster(PoolError):
    """The cluster disappeared while the search was connected; the message is one line."""


@contextmanager
def connection(address: str, cpus: int) -> Iterator["Cluster"]:
    """Connect to Ray; afterwards disconnect, and stop it if it was started here.

    Must run in the main thread, with signal handlers that raise: SIGINT, SIGTERM and SIGHUP keep
    the caller's handlers throughout, so they interrupt the start, too.

    Args:
        address: `local` for a private Ray; `auto` for the cluster that RAY_ADDRESS or the file
            of the last `ray start` names; or host:port of a cluster's head.
        cpus: CPUs that a private Ray offers; ignored for a running cluster.

    Raises:
        ValueError: If there is no cluster, it does not answer or refuses the token; one line.
        LostCluster: If it answered the probe and then fails or hangs.
    """
    with ExitStack() as stack:
        if address == LOCAL:
            head, login = stack.enter_context(own_ray(cpus))
        else:
            head, login = addresses.resolve(address)
            addresses.probe(head, login)
        cluster = Cluster(head)
        stack.callback(cluster.close)
        cluster.open(login)
        yield cluster


class Cluster:
    """A connected cluster, with a table of its nodes that a thread keeps up to date.

    A query to a dead head blocks its thread forever. So one thread polls, and another declares
    the cluster lost when the first falls silent.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self._node = ""
        self._resources: dict[str, dict[str, float]] = {}
        self._free: dict[str, dict[str, float]] = {}
        self._wish: list[dict[str, float]] = []
        self._draining: frozenset[str] = frozenset()
        self._answered = threading.Event()
        self._over = threading.Event()
        self._reason = ""
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._look, self._judge)]

    def check(self) -> None:
        """Raise LostCluster if the head or this machine's node is gone; does not query Ray."""
        if self._reason:
            self._over.set()
            raise LostCluster(self._reason)

    def capacities(self, cpus: int, gpus: float) -> dict[str, Capacity]:
        """Return how many workers each live node holds, by node id.

        A draining node keeps its workers for now but takes no new ones, so it counts 0. A killed
        node still counts as live for about 15 s, until the head misses its heartbeats.

        Args:
            cpus: CPUs of a worker, at least 1.
            gpus: GPUs of a worker; a fraction is a share of one GPU.
        """
        free = self._free
        return {
            name: Capacity(
                0 if name in self._draining else workers_on(resources, cpus, gpus),
                at_most(free.get(name, {}), cpus, gpus),
            )
            for name, resources in self._resources.items()
        }

    def wish(self, workers: int, cpus: int, gpus: float) -> None:
        """Ask the autoscaler, if there is one, for room for this many workers in total."""
        self._wish = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * workers

    def open(self, login: Mapping[str, str | None]) -> None:
        """Connect this process; `login` holds the variables that Ray reads its token from."""
        atexit.register(_leave)
        try:
            with _no_stderr():
                _call(lambda: self._connect(login), _CONNECT_SECONDS)
        except (CallTimeout, ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            kind = type(error).__name__
            self._reason = f"Ray at {self._head} answered a moment ago but fails now ({kind})"
            self.check()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Disconnect, unless the cluster is lost: then disconnecting would hang or crash."""
        self._over.set()
        if self._threads[0].ident:
            self._threads[0].join(_END_SECONDS)
        if not self._reason and not self._threads[0].is_alive():
            with suppress(CallTimeout):
                _call(self._disconnect, _END_SECONDS)
                atexit.unregister(_leave)

    def _connect(self, login: Mapping[str, str | None]) -> None:
        # Otherwise Ray prints its own errors on our stderr and its nodes' errors on our stdout.
        level = {"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}
        ray._private.worker._worker_logs_enabled = False
        with _environment({**login, **level}):
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
            ray.init(address=self._head, log_to_driver=False, logging_level=logging.CRITICAL)
        self._node = ray.get_runtime_context().get_node_id()
        self._ask()

    def _disconnect(self) -> None:
        if self._wish:  # else the cluster keeps the request, and the autoscaler its machines
            with suppress(ConnectionError, RuntimeError, ray.exceptions.RayError):
                request_resources(bundles=[])
        ray.shutdown()

    def _ask(self) -> dict[str, Any] | None:
        """Query the head for its nodes; return this machine's, or None if it is not alive."""
        live = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._draining = frozenset(ray._private.state.state.get_draining_nodes())
        self._free = ray._private.state.available_resources_per_node()
        self._resources = {name: node["Resources"] for name, node in live.items()}
        return live.get(self._node)

    def _look(self) -> None:
        """Query the head every second, and check that this machine's node still listens."""
        wished: list[dict[str, float]] = []
        while not self._over.wait(1):
            this_node = self._ask()
            if self._wish != wished:
                wished = self._wish
                request_resources(bundles=wished)
            if this_node is None or not _listens(
                this_node["NodeManagerAddress"], this_node["NodeManagerPort"]
            ):
                self._reason = "Ray's node on this machine is gone"
                return
            self._answered.set()

    def _judge(self) -> None:
        """Declare a silent cluster lost, and exit if `check` or `close` is not called in time."""
        silent = 0.0
        # Counted in steps: the clock runs on while this process is suspended.
        while not self._over.wait(0.5) and not self._reason:
            silent = 0.0 if self._answered.is_set() else silent + 0.5
            self._answered.clear()
            if silent >= _SILENCE_SECONDS:
                self._reason = f"Ray's head at {self._head} has not answered for {silent:g} s"
        if not self._over.wait(_GRACE_SECONDS):
            print(f"error: {self._reason}", file=sys.stderr)
            _leave()


def workers_on(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers with these CPUs and GPUs each fit on a node's resources."""
    by_cpu = int(resources.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    devices = int(resources.get("GPU", 0))
    # The small term guards against rounding: 1 / 0.1 must give ten.
    by_gpu = devices * int(1 / gpus + 1e-9) if gpus < 1 else devices // int(gpus)
    return min(by_cpu, by_gpu)


def at_most(free: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers a node's free resources hold, treating its GPUs as one pool."""
    by_cpu = int(free.get("CPU", 0) // cpus)
    return min(by_cpu, int(free.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpu


def pinned(node: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor on this node and no other."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _call(call: Callable[[], object], seconds: float) -> None:
    """Make a Ray call that may hang, and restore the signal handlers that it replaces.

    Raises:
        CallTimeout: If it does not return in this time; it keeps running in its thread.
    """
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    pool = ThreadPool(1)  # A daemon thread: the main thread could not abandon a hung call.
    result = pool.apply_async(call)
    pool.close()
    deadline = time.monotonic() + seconds
    while True:
        done = result.ready()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if done or time.monotonic() > deadline:
            result.get(0)
            return
        result.wait(0.01)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discard this process's stderr: Ray announces there that it is going to be quiet."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _END_SECONDS).close()
    except OSError:
        return False
    return True


def _leave() -> None:
    """Exit at once: with a lost cluster, Ray's shutdown and Python's hang or crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_LOST)
