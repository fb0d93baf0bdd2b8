"""A search under faults: workers killed and stopped, nodes lost and added, the driver killed.

`run_search.py` searches on the embedded model on a Ray cluster of three nodes with four CPU
workers, all on this machine. Every few seconds a seeded choice of fault is made for real, on
processes started here and their descendants; a dead driver is started again with `--resume`. At the
end the journal must equal, byte for byte, that of the same search with one worker and no faults.
Texts are small, so that thousands of candidates take minutes.
"""

import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from tables import ROOT, conditions, show, write_json

from prunevolve.configs.schema import ROLES
from prunevolve.pruning.json_file import JsonObject

END_SECONDS = 60.0  # in which workers must be gone after the driver ends
MOST_NODES = 2  # besides the head
MOST_SECONDS = 5400.0  # after which the search has failed

KINDS = ("worker killed", "worker stopped", "node", "driver killed")
"""Kinds of fault. A round has each once, so a short search meets them all."""

SMALL = [
    *(f"{role}.{setting}" for role in ROLES for setting in ("windows=4", "length=64")),
    *("search.stages=[1, 2]", "search.lag=16", "search.population=16", "ray.wait_seconds=120"),
]


def main(
    candidates: Annotated[int, typer.Option(help="Candidates of the search.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the faults.")] = 0,
    pause: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exits 1 if the journal differs from that of the undisturbed search."""
    settings = [*SMALL, f"search.seed={seed}", f"search.candidates={candidates}"]
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = Path(scratch)  # short, since Ray makes sockets in it
        began = time.monotonic()
        quiet = Driver(folder / "quiet", [*settings, "ray.workers=1"])
        quiet.start()
        if quiet.process.wait(MOST_SECONDS):
            raise SystemExit(f"the quiet run fails: {quiet.log.read_text()[-2000:]}")
        quiet_seconds, began = time.monotonic() - began, time.monotonic()
        with closing(Nodes(folder)) as nodes:
            on_ray = [f"ray.address={nodes.address}", "ray.workers=4"]
            driver = Driver(folder / "fired", [*settings, *on_ray])
            faults = Faults(nodes, driver, random.Random(seed))
            exits = _search(driver, faults, pause, began + MOST_SECONDS)
            ended = time.monotonic()
            while (left := len(nodes.workers())) and time.monotonic() < ended + END_SECONDS:
                time.sleep(0.5)
        figures: JsonObject = {
            "faults": dict(faults.made),
            "lost": candidates - driver.committed,
            "journal_identical": driver.journal.read_bytes() == quiet.journal.read_bytes(),
            "exits": dict(exits),
            "workers_left": left,
            "seconds": round(ended - began, 1),
            "quiet_seconds": round(quiet_seconds, 1),
        }
    bars = {"lost": "0", "journal_identical": "True", "workers_left": "0", "exits": "3 or -9"}
    title = f"{candidates} candidates under faults, the embedded model, 4 workers on 3 nodes"
    rows = [[name, value, bars.get(name, "")] for name, value in figures.items()]
    show(title, ["", "figure", "bar"], rows)
    write_json(json, {**conditions("float32"), **figures})
    raise typer.Exit(0 if figures["journal_identical"] else 1)


class Driver:
    """A search in its own process, which can be started, killed and resumed."""

    def __init__(self, out: Path, settings: Sequence[str]) -> None:
        self.journal, self.log = out / "journal.jsonl", out.with_suffix(".log")
        self.lines = 0  # in the journal when the process was started
        self._out = out
        self._new = ["--out", str(out), *(f"--set={setting}" for setting in settings)]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the process, with a new run or resuming the old one."""
        resumes = (self._out / "config.yaml").exists()
        command = [sys.executable, str(ROOT / "run_search.py")]
        command += ["--resume", str(self._out)] if resumes else self._new
        self.lines = self.committed
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def committed(self) -> int:
        """Number of lines in the journal."""
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    def kill(self) -> None:
        """Kill the process, if it runs."""
        self.process.kill()
        self.process.wait()


class Nodes:
    """The nodes of a cluster on the loopback interface, three at first, and the processes on them.

    Ray's files are in a folder.
    """

    def __init__(self, folder: Path) -> None:
        os.environ |= {
            # Else Ray replaces 127.0.0.1 by this machine's outer address, on its import.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 2, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = str(self._cluster.address)
        for _ in range(MOST_NODES):
            self.add()

    def add(self) -> None:
        """Add a node."""
        self._cluster.add_node(num_cpus=1, include_dashboard=False)

    def change(self, rng: random.Random) -> str:
        """Add or remove a further node; return which."""
        further = sorted(self._cluster.worker_nodes, key=lambda node: node.node_manager_port)
        if not further or (len(further) < MOST_NODES and rng.random() < 0.5):
            self.add()
            return "node added"
        # All its processes at once, as when its machine is switched off.
        node = rng.choice(further)
        processes = _processes([node])
        self._cluster.remove_node(node, allow_graceful=False)
        _kill(processes)
        return "node removed"

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers, by the title that Ray gives them."""
        workers = []
        for process in _processes(self._all()):
            with suppress(psutil.NoSuchProcess):
                if re.match(r"ray::\S*Worker", "".join(process.cmdline())):
                    workers.append(process)
        return sorted(workers, key=lambda worker: worker.pid)

    def close(self) -> None:
        """Kill every process of the cluster."""
        processes = _processes(self._all())
        self._cluster.shutdown()
        _kill(processes)

    def _all(self) -> list[Any]:
        return [self._cluster.head_node, *self._cluster.worker_nodes]


def _processes(nodes: Sequence[Any]) -> set[psutil.Process]:
    """Return the processes of Ray's nodes and all below them."""
    processes = set()
    for info in (i for node in nodes for kind in node.all_processes.values() for i in kind):
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(info.process.pid)
            processes |= {parent, *parent.children(recursive=True)}
    return processes


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        # psutil compares creation times, so a process with a reused id is left alone.
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Faults:
    """Makes faults in rounds, and counts them by kind."""

    def __init__(self, nodes: Nodes, driver: Driver, rng: random.Random) -> None:
        self.nodes, self.driver, self.rng = nodes, driver, rng
        self.made = Counter[str]()
        self._planned: list[str] = []

    def make(self) -> None:
        """Make the first planned fault that is possible now, if there is one."""
        self._planned = self._planned or self.rng.sample(KINDS, len(KINDS))
        workers = [p for p in self.nodes.workers() if p.status() != psutil.STATUS_STOPPED]
        impossible = set() if workers else {"worker killed", "worker stopped"}
        if self.driver.committed == self.driver.lines:  # the search might make no progress
            impossible.add("driver killed")
        kind = next((kind for kind in self._planned if kind not in impossible), None)
        if kind is None:
            return
        self._planned.remove(kind)
        if kind == "node":
            kind = self.nodes.change(self.rng)
        elif kind == "driver killed":
            self.driver.kill()
        else:
            number = signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(workers).send_signal(number)
        self.made[kind] += 1


def _search(driver: Driver, faults: Faults, pause: float, limit: float) -> Counter[str]:
    """Make faults until the search is done; return counts of the exit codes before."""
    codes = Counter[str]()
    driver.start()
    try:
        due, committed = time.monotonic() + pause, 0
        while (code := driver.process.poll()) != 0:
            if code is not None:
                codes[str(code)] += 1
                if code not in (3, -signal.SIGKILL):
                    raise SystemExit(f"the search exits {code}: {driver.log.read_text()[-2000:]}")
                driver.start()
            if time.monotonic() > limit:
                raise SystemExit(f"only {driver.committed} candidates when time was up")
            # If workers died faster than they start, the search would never end.
            if time.monotonic() > due and driver.committed > committed:
                faults.make()
                due = time.monotonic() + pause * faults.rng.uniform(0.5, 1.5)
                committed = driver.committed
            time.sleep(0.1)
    finally:
        driver.kill()
    return codes


if __name__ == "__main__":
    typer.run(main)
