"""Faults for a search on a Ray cluster of this machine: who is killed, stopped, removed, added.

All that is ever signalled descends from the processes that were started here.
"""

import os
import random
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from search.pool.keeper import LOOPBACK

HEAD_CPUS, NODE_CPUS, MOST_NODES = 2, 1, 2
"""Cores that the head and each further node declare, and how many of these there are."""

ROUND = {"worker killed": 3, "worker stopped": 1, "node": 2, "driver killed": 1}
"""How often each fault is made in a round; each of them once before any is made twice, so that a
short search meets them all."""


@contextmanager
def cluster(folder: Path, root: Path) -> Iterator["Nodes"]:
    """Start a cluster of three nodes on the loopback interface; nothing of it stays.

    Args:
        folder: Of Ray's session; its path must be short.
        root: Where the workers find the project.
    """
    folder.mkdir()
    os.environ |= {
        **LOOPBACK,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    nodes = Nodes()
    try:
        for _ in range(MOST_NODES):
            nodes.add()
        yield nodes
    finally:
        nodes.close()


class Nodes:
    """The nodes of a cluster, with the processes on them."""

    def __init__(self) -> None:
        # After `cluster` has set what Ray reads when it is imported.
        from ray.cluster_utils import Cluster

        head = {"num_cpus": HEAD_CPUS, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._seen: set[psutil.Process] = set()

    @property
    def address(self) -> str:
        """Where the head listens."""
        return str(self._cluster.address)

    @property
    def further(self) -> list[Any]:
        """The nodes beside the head."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_manager_port)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers that are not stopped, by their number."""
        return [p for p in self._workers() if p.status() != psutil.STATUS_STOPPED]

    def add(self) -> None:
        """Add a node."""
        self._cluster.add_node(num_cpus=NODE_CPUS, include_dashboard=False)

    def remove(self, node: Any) -> None:
        """Kill all processes of a node at once, as when its machine is switched off."""
        processes = self._below(node)
        self._cluster.remove_node(node, allow_graceful=False)
        _kill(processes)

    def left(self, seconds: float) -> int:
        """Return how many workers are still there after some time; fewer as soon as none is."""
        limit = time.monotonic() + seconds
        while (workers := self._workers()) and time.monotonic() < limit:
            time.sleep(0.5)
        return len(workers)

    def close(self) -> None:
        """Kill everything that ran here."""
        self._look()
        self._cluster.shutdown()
        _kill(list(self._seen))

    def _workers(self) -> list[psutil.Process]:
        found = []
        for process in self._look():
            with suppress(psutil.NoSuchProcess):
                if "".join(process.cmdline()).startswith("ray::_Worker"):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def _look(self) -> list[psutil.Process]:
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        found = [process for node in nodes for process in self._below(node)]
        self._seen.update(found)
        return found

    def _below(self, node: Any) -> list[psutil.Process]:
        found = []
        for processes in node.all_processes.values():
            for info in processes:
                with suppress(psutil.NoSuchProcess):
                    parent = psutil.Process(info.process.pid)
                    found += [parent, *parent.children(recursive=True)]
        return found


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        # psutil compares the time of birth: a number that was given again is left alone.
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass
class Driver:
    """A search as a process of its own, which is begun, and begun again where it was.

    Attributes:
        begin: The command of a new run.
        resume: The command that goes on with it.
        out: The run folder.
        log: Where it writes what it says.
    """

    begin: list[str]
    resume: list[str]
    out: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    lines: int = 0

    def start(self) -> None:
        """Start the process."""
        command = self.resume if (self.out / "config.yaml").exists() else self.begin
        self.lines = self.committed
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def committed(self) -> int:
        """How many lines the journal has."""
        path = self.out / "journal.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def code(self) -> int | None:
        """Return the process's exit code, None while it runs."""
        assert self.process
        return self.process.poll()

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Killer:
    """Chooses faults by a seed, and makes them.

    Attributes:
        faults: How many of each kind were made.
    """

    nodes: Nodes
    driver: Driver
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    _round: list[str] = field(default_factory=list)

    def strike(self) -> None:
        """Make one fault: the next that can be made now."""
        if not self._round:
            again = [kind for kind, times in ROUND.items() for _ in range(times - 1)]
            self._round = self._shuffled([*ROUND]) + self._shuffled(again)
        workers = self.nodes.workers()
        for kind in self._round:
            if self._can(kind, workers):
                self._round.remove(kind)
                self._make(kind, workers)
                return

    def _shuffled(self, kinds: list[str]) -> list[str]:
        return self.rng.sample(kinds, len(kinds))

    def _can(self, kind: str, workers: list[psutil.Process]) -> bool:
        if kind == "driver killed":
            # Else it would never get on.
            return self.driver.committed > self.driver.lines
        return kind == "node" or bool(workers)

    def _make(self, kind: str, workers: list[psutil.Process]) -> None:
        if kind == "node":
            kind = self._change_nodes()
        elif kind == "driver killed":
            self.driver.kill()
        else:
            number = signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(workers).send_signal(number)
        self.faults[kind] += 1

    def _change_nodes(self) -> str:
        further = self.nodes.further
        if not further or (len(further) < MOST_NODES and self.rng.random() < 0.5):
            self.nodes.add()
            return "node added"
        self.nodes.remove(self.rng.choice(further))
        return "node removed"
