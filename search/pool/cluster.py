"""How a search is connected to Ray: to one of its own, or to a cluster that runs.

A Ray of its own hears the loopback interface alone, takes a token that nobody else knows, and is
gone, folder and all, when the search is (`keeper.py`). A running cluster is probed first
(`address.py`). Once connected, threads watch the head and this machine's node, because Ray hangs
a driver that has lost them, and ends it after a minute.
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
    """Set variables of the environment, None for unset, and put them back afterwards."""
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


# Without the second, a call after the end starts another Ray.
with _environment({**LOOPBACK, "RAY_ENABLE_AUTO_CONNECT": "0"}):
    import ray as ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
    from ray.autoscaler.sdk import request_resources
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOCAL = "local"
EXIT_LOST = 3
"""The exit code of a process that has lost its cluster: interrupted, resumable."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CONNECT_SECONDS = 30.0
_END_SECONDS = 5.0
_SILENCE_SECONDS = 10.0
_GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Capacity:
    """How many workers a node holds.

    Attributes:
        whole: When it is empty.
        free: Now, beside all that is there, at most; some seconds old.
    """

    whole: int
    free: int


class LostCluster(PoolError):
    """The cluster is gone while the search was connected; the message is one line."""


@contextmanager
def connection(address: str, cpus: int) -> Iterator["Cluster"]:
    """Connect to Ray, and leave it as it was found, or gone if it was started here.

    Needs the main thread, and signal handlers that raise: SIGINT, SIGTERM and SIGHUP are the
    caller's all the while, and end the start, too.

    Args:
        address: `local` for a Ray of its own; `auto` for the cluster that RAY_ADDRESS or the file
            of the last `ray start` names; or host:port of a cluster's head.
        cpus: CPUs that a Ray of its own hands out; a running cluster has its own.

    Raises:
        ValueError: If there is no cluster, it does not answer or refuses the token; one line.
        LostCluster: If it answered, and hangs.
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
    """A connected cluster, with a table of its nodes that a thread keeps fresh.

    A question to a head that is gone blocks its thread for good. So only one thread asks, and
    another judges by its silence.
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
        """Raise LostCluster if the head or this machine's node is gone; costs nothing."""
        if self._reason:
            self._over.set()
            raise LostCluster(self._reason)

    def capacities(self, cpus: int, gpus: float) -> dict[str, Capacity]:
        """Return how many workers each live node holds, by node id.

        A node that is being drained keeps its workers for now and takes no other: it holds 0. One
        that is killed stays live for some 15 s more, until the head has missed its heartbeats.

        Args:
            cpus: CPUs of a worker, at least 1.
            gpus: GPUs of a worker; a fraction lies within one GPU.
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
        """Ask an autoscaler, if there is one, for room for so many workers in all."""
        self._wish = [{"CPU": cpus, **({"GPU": gpus} if gpus else {})}] * workers

    def open(self, login: Mapping[str, str | None]) -> None:
        """Connect this process; `login` has the variables that Ray takes its token from."""
        atexit.register(_leave)
        try:
            with _no_stderr():
                _call(lambda: self._connect(login), _CONNECT_SECONDS)
        except (CallTimeout, ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            kind = type(error).__name__
            self._reason = f"Ray at {self._head} answered a moment ago, and fails now ({kind})"
            self.check()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Disconnect; from a lost cluster not even that, which would hang or crash."""
        self._over.set()
        if self._threads[0].ident:
            self._threads[0].join(_END_SECONDS)
        if not self._reason and not self._threads[0].is_alive():
            with suppress(CallTimeout):
                _call(self._disconnect, _END_SECONDS)
                atexit.unregister(_leave)

    def _connect(self, login: Mapping[str, str | None]) -> None:
        # Else Ray prints its own errors on our stderr, and those of its nodes on our stdout.
        level = {"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}
        ray._private.worker._worker_logs_enabled = False
        with _environment({**login, **level}):
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
            ray.init(address=self._head, log_to_driver=False, logging_level=logging.CRITICAL)
        self._node = ray.get_runtime_context().get_node_id()
        self._ask()

    def _disconnect(self) -> None:
        if self._wish:  # Ray keeps it for the cluster, and an autoscaler the machines
            with suppress(ConnectionError, RuntimeError, ray.exceptions.RayError):
                request_resources(bundles=[])
        ray.shutdown()

    def _ask(self) -> dict[str, Any] | None:
        """Ask the head for its nodes; returns this machine's, None if it is not alive."""
        live = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        self._draining = frozenset(ray._private.state.state.get_draining_nodes())
        self._free = ray._private.state.available_resources_per_node()
        self._resources = {name: node["Resources"] for name, node in live.items()}
        return live.get(self._node)

    def _look(self) -> None:
        """Ask the head every second, and knock at this machine's node."""
        wished: list[dict[str, float]] = []
        while not self._over.wait(1):
            own = self._ask()
            if self._wish != wished:
                wished = self._wish
                request_resources(bundles=wished)
            if own is None or not _listens(own["NodeManagerAddress"], own["NodeManagerPort"]):
                self._reason = "Ray's node on this machine is gone"
                return
            self._answered.set()

    def _judge(self) -> None:
        """Find the cluster lost by its silence, and end the process if nobody minds."""
        silent = 0.0
        # Counted in steps: the clock deceives a process that was stopped meanwhile.
        while not self._over.wait(0.5) and not self._reason:
            silent = 0.0 if self._answered.is_set() else silent + 0.5
            self._answered.clear()
            if silent >= _SILENCE_SECONDS:
                self._reason = f"Ray's head at {self._head} has not answered for {silent:g} s"
        if not self._over.wait(_GRACE_SECONDS):
            print(f"error: {self._reason}", file=sys.stderr)
            _leave()


def workers_on(resources: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers of these CPUs and GPUs fit one node with these resources."""
    by_cpu = int(resources.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpu
    devices = int(resources.get("GPU", 0))
    # The small number makes 1 / 0.1 ten, whatever its last bit.
    by_gpu = devices * int(1 / gpus + 1e-9) if gpus < 1 else devices // int(gpus)
    return min(by_cpu, by_gpu)


def at_most(free: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers the free resources of a node can hold, if its GPUs were one."""
    by_cpu = int(free.get("CPU", 0) // cpus)
    return min(by_cpu, int(free.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpu


def pinned(node: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that places an actor on this node or nowhere."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _call(call: Callable[[], object], seconds: float) -> None:
    """Make a call of Ray's, which may hang, and undo what it does to the signals' handlers.

    Raises:
        CallTimeout: If it has not returned in this time; it goes on in its thread.
    """
    handlers = {number: signal.getsignal(number) for number in _STOPPING}
    pool = ThreadPool(1)  # A daemon: the main thread could not leave a call that hangs.
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
    """Send this process's stderr nowhere: Ray announces there that it is going to be quiet."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _END_SECONDS).close()
    except OSError:
        return False
    return True


def _leave() -> None:
    """End the process at once; a lost cluster hangs or crashes Ray's end and Python's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_LOST)
