"""Faults for a search on a local Ray cluster: kill, stop, remove or add workers, nodes, the driver.

Signals are sent only to processes started here and their descendants.
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
"""Cores that the head and each further node declare, and the most further nodes."""

ROUND = {"worker killed": 3, "worker stopped": 1, "node": 2, "driver killed": 1}
"""Number of faults of each kind in a round. Each kind occurs once before any occurs again, so that
even a short search meets them all."""


@contextmanager
def cluster(folder: Path, root: Path) -> Iterator["Nodes"]:
    """Start a cluster of three nodes on the loopback interface, and end all of it on exit.

    Args:
        folder: Folder of Ray's session; its path must be short.
        root: Folder in which workers find the project.
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
    """The nodes of a cluster, and the processes on them."""

    def __init__(self) -> None:
        # Imported after `cluster` has set the environment, which Ray reads at import.
        from ray.cluster_utils import Cluster

        head = {"num_cpus": HEAD_CPUS, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._seen: set[psutil.Process] = set()

    @property
    def address(self) -> str:
        """Address on which the head listens."""
        return str(self._cluster.address)

    @property
    def further(self) -> list[Any]:
        """The nodes other than the head."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_manager_port)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers that are not stopped, ordered by process id."""
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
        """Return how many workers remain after `seconds`, or 0 as soon as none does."""
        limit = time.monotonic() + seconds
        while (workers := self._workers()) and time.monotonic() < limit:
            time.sleep(0.5)
        return len(workers)

    def close(self) -> None:
        """Kill every process of the cluster."""
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
        # psutil compares creation times, so a process with a reused id is left alone.
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass
class Driver:
    """A search in its own process, which can be started, killed and resumed.

    Attributes:
        begin: The command that starts a new run.
        resume: The command that resumes it.
        out: The run folder.
        log: File for its output.
    """

    begin: list[str]
    resume: list[str]
    out: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    lines: int = 0

    def start(self) -> None:
        """Start the process, with a new run or resuming the old one."""
        command = self.resume if (self.out / "config.yaml").exists() else self.begin
        self.lines = self.committed
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def committed(self) -> int:
        """Number of lines in the journal."""
        path = self.out / "journal.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def code(self) -> int | None:
        """Return the process's exit code, or None while it runs."""
        assert self.process
        return self.process.poll()

    def kill(self) -> None:
        """Kill the process, if it runs."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass
class Killer:
    """Chooses faults with a seeded generator, and makes them.

    Attributes:
        faults: Number of faults made, by kind.
    """

    nodes: Nodes
    driver: Driver
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    _round: list[str] = field(default_factory=list)

    def strike(self) -> None:
        """Make the next fault that is possible now."""
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
            # Otherwise the search might never make progress.
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
