"""A search under faults: workers killed and stopped, nodes lost and added, the driver killed.

`run_search.py` searches on the embedded model on a Ray cluster of three nodes with four CPU
workers, all on this machine. Every few seconds a seeded choice of fault is made for real, on
processes started here and their descendants; a dead driver is started again with `--resume`. At the
end the journal must equal, byte for byte, that of the same search with one worker and no faults.
Texts are small, so that thousands of candidates take minutes.
"""

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from real_run import watching, workers_among
from tables import ROOT, conditions, show_figures, write_json

from prunevolve.configs import schema

PATIENCE = 60.0
"""Extra seconds that a fault waits for a commit: if workers died faster than they start, the search
would never end."""

END_SECONDS = 60.0
"""Seconds in which workers must be gone after the driver ends."""

HEAD_CPUS, NODE_CPUS, MOST_NODES = 2, 1, 2
"""Cores that the head and each further node declare, and the most further nodes."""

KINDS = ("worker killed", "worker stopped", "node", "driver killed")
AGAIN = ("worker killed", "worker killed", "node")
"""Kinds of fault. A round has each once, then some again, so a short search meets them all."""

SMALL = [
    *("calibration.windows=4", "calibration.length=64", "fitness.windows=4", "fitness.length=64"),
    *("selection.windows=4", "selection.length=64", "report.windows=4", "report.length=64"),
    *("search.stages=[1, 2]", "search.lag=16", "search.brood=2"),
    *("search.population=16", "ray.wait_seconds=120"),
]


def main(
    candidates: Annotated[int, typer.Option(help="Candidates of the search.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the faults.")] = 0,
    pause: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 4.0,
    minutes: Annotated[
        float, typer.Option(help="Minutes after which the search has failed.")
    ] = 90.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exits 1 if the journal differs from that of the undisturbed search."""
    settings = [*SMALL, f"search.seed={seed}", f"search.candidates={candidates}"]
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        folder = Path(place)  # short, since Ray makes sockets in it
        began = time.monotonic()
        quiet = Driver(folder, "quiet", [*settings, "ray.workers=1"])
        quiet.start()
        if quiet.process.wait(60 * minutes):
            raise SystemExit(f"the quiet run fails: {quiet.log.read_text()[-2000:]}")
        quiet_seconds, began = time.monotonic() - began, time.monotonic()
        with cluster(folder / "ray") as nodes:
            on_ray = [f"ray.address={nodes.address}", "ray.workers=4"]
            driver = Driver(folder, "fired", [*settings, *on_ray])
            faults, exits = _search_under_faults(
                nodes, driver, random.Random(seed), pause, began + 60 * minutes
            )
            seconds = time.monotonic() - began
            while (
                left := len(nodes.workers())
            ) and time.monotonic() - began < seconds + END_SECONDS:
                time.sleep(0.5)
        evaluations = driver.evaluations.read_text(encoding="ascii").splitlines()
        figures: dict[str, Any] = {
            "faults": dict(faults),
            "lost": candidates - driver.committed,
            "repeated": _repeats(evaluations, "done"),
            "begun_again": _repeats(evaluations, "given"),
            "journal_identical": driver.journal.read_bytes() == quiet.journal.read_bytes(),
            "exits": dict(exits),
            "workers_left": left,
            "seconds": round(seconds, 1),
            "quiet_seconds": round(quiet_seconds, 1),
        }
    bars = {"lost": "0", "journal_identical": "True", "workers_left": "0", "exits": "3 or -9"}
    title = f"{candidates} candidates under faults, the embedded model, 4 workers on 3 nodes"
    show_figures(title, figures, bars)
    write_json(json, {**conditions("float32"), **figures})
    raise typer.Exit(0 if figures["journal_identical"] else 1)


@contextmanager
def cluster(folder: Path) -> Iterator["Nodes"]:
    """Start a cluster of three nodes on the loopback interface, and end all of it on exit."""
    folder.mkdir()
    os.environ |= {
        # Else Ray replaces 127.0.0.1 by this machine's outer address, on its import.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **watching(folder.parent / "fired.evaluations", "0"),
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
        self.address = str(self._cluster.address)

    def add(self) -> None:
        """Add a node."""
        self._cluster.add_node(num_cpus=NODE_CPUS, include_dashboard=False)

    def change(self, rng: random.Random) -> str:
        """Add or remove a further node; return which."""
        further = sorted(self._cluster.worker_nodes, key=lambda node: node.node_manager_port)
        if not further or (len(further) < MOST_NODES and rng.random() < 0.5):
            self.add()
            return "node added"
        # All its processes at once, as when its machine is switched off.
        node = rng.choice(further)
        processes = self._processes([node])
        self._cluster.remove_node(node, allow_graceful=False)
        _kill(processes)
        return "node removed"

    def workers(self) -> list[psutil.Process]:
        """Return the processes of workers, ordered by process id."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        return workers_among(self._processes(nodes))

    def close(self) -> None:
        """Kill every process of the cluster."""
        processes = self._processes([self._cluster.head_node, *self._cluster.worker_nodes])
        self._cluster.shutdown()
        _kill(processes)

    def _processes(self, nodes: list[Any]) -> set[psutil.Process]:
        """Return the processes of nodes and all below them."""
        found = set()
        for info in (i for node in nodes for kind in node.all_processes.values() for i in kind):
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(info.process.pid)
                found |= {parent, *parent.children(recursive=True)}
        return found


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        # psutil compares creation times, so a process with a reused id is left alone.
        with suppress(psutil.NoSuchProcess):
            process.kill()


class Driver:
    """A search in its own process, which can be started, killed and resumed."""

    def __init__(self, folder: Path, name: str, settings: list[str]) -> None:
        self.log, self.evaluations = folder / f"{name}.log", folder / f"{name}.evaluations"
        self.journal = folder / name / "journal.jsonl"
        self.lines = 0
        self._out, config = folder / name, folder / f"{name}.yaml"
        config.write_text(schema.to_yaml(schema.load(None, settings)))
        script = str(ROOT / "benchmarks" / "watched_search.py")
        self._command = [sys.executable, script, str(self.evaluations), "0"]
        self._new = ["--config", str(config), "--out", str(self._out)]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the process, with a new run or resuming the old one."""
        resumes = (self._out / "config.yaml").exists()
        command = [*self._command, *(["--resume", str(self._out)] if resumes else self._new)]
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


def _search_under_faults(
    nodes: Nodes, driver: Driver, rng: random.Random, pause: float, limit: float
) -> tuple[Counter[str], Counter[str]]:
    """Make faults until the search is done; return counts of faults and of the exit codes."""
    faults, codes = Counter[str](), Counter[str]()
    planned: list[str] = []
    driver.start()
    try:
        due, committed = time.monotonic() + pause * rng.uniform(0.5, 1.5), 0
        while (code := driver.process.poll()) != 0:
            if code is not None:
                codes[str(code)] += 1
                if code not in (3, -signal.SIGKILL):
                    raise SystemExit(f"the search exits {code}: {driver.log.read_text()[-2000:]}")
                driver.start()
            if time.monotonic() > limit:
                raise SystemExit(f"only {driver.committed} candidates when time was up")
            if time.monotonic() > due + PATIENCE * (driver.committed <= committed):
                planned = planned or [*rng.sample(KINDS, len(KINDS)), *rng.sample(AGAIN, 3)]
                faults.update(_make_fault(planned, nodes, driver, rng))
                due, committed = time.monotonic() + pause * rng.uniform(0.5, 1.5), driver.committed
            time.sleep(0.1)
    finally:
        driver.kill()
    return faults, codes


def _make_fault(
    planned: list[str], nodes: Nodes, driver: Driver, rng: random.Random
) -> Iterator[str]:
    """Make the first planned fault that is possible now, and yield its kind."""
    workers = [p for p in nodes.workers() if p.status() != psutil.STATUS_STOPPED]
    possible = {"node"}
    if workers:
        possible |= {"worker killed", "worker stopped"}
    if driver.committed > driver.lines:  # otherwise the search might never make progress
        possible.add("driver killed")
    kind = next((kind for kind in planned if kind in possible), None)
    if kind is None:
        return
    planned.remove(kind)
    if kind == "node":
        kind = nodes.change(rng)
    elif kind == "driver killed":
        driver.kill()
    else:
        with suppress(psutil.NoSuchProcess):
            number = signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP
            rng.choice(workers).send_signal(number)
    yield kind


def _repeats(evaluations: list[str], event: str) -> int:
    """Return how many there were beyond the first for each candidate."""
    counts = Counter(line.split()[1] for line in evaluations if line.startswith(event))
    return counts.total() - len(counts)


if __name__ == "__main__":
    typer.run(main)
