"""How a search is connected to Ray, with a real Ray in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from search.pool import address
from search.pool.cluster import EXIT_LOST, workers_on
from search.pool.keeper import own_ray

ROOT = Path(__file__).parents[3]
GONE_SECONDS = 10
"""Within which an exit, or the end after one, has to come; it takes half a second when idle."""

HOSTILE = {"RAY_ADDRESS": "nowhere:1", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "known"}

DRIVER = """
import json, os, select, signal, subprocess, sys, time

def stop(number, frame):
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
from search.pool.cluster import LostCluster, connection, pinned
import ray

class Worker:
    def facts(self):
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        return os.getpid(), os.nice(0), child.pid

def serve(cluster):
    node, capacity = max(cluster.capacities(1, 0).items(), key=lambda pair: pair[1].whole)
    build = ray.remote(Worker).options
    worker = build(num_cpus=1, scheduling_strategy=pinned(node)).remote()
    pid, nice, child = ray.get(worker.facts.remote())
    found = {"room": capacity.whole, "worker": pid, "nice": nice, "child": child}
    found["head"] = ray.get_runtime_context().gcs_address
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
    try:
        ray.get(build(num_cpus=1, scheduling_strategy=pinned("ab" * 28)).remote().facts.remote())
    except ray.exceptions.ActorUnschedulableError:
        found["pinned"] = True
    print("up " + json.dumps(found), flush=True)
    line = ""
    while not line:
        time.sleep(0.1)
        cluster.check()
        line = sys.stdin.readline() if select.select([sys.stdin], [], [], 0)[0] else ""

try:
    print("begun", flush=True)
    with connection(sys.argv[1], 2) as cluster:
        serve(cluster)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(3)
except (LostCluster, ValueError) as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(2)  # a lost cluster makes it EXIT_LOST
"""


@dataclass
class Driver:
    """A process that holds a connection."""

    process: subprocess.Popen[str]
    found: dict[str, object]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def folder(self) -> Path:
        commands = [process.cmdline() for process in self.descendants()]
        return next(Path(words[4]) for words in commands if words[3:4] == ["keep"])

    def named(self, part: str) -> psutil.Process:
        return next(p for p in self.descendants() if part in p.cmdline()[0])


def begin(ray_address: str, **variables: str) -> subprocess.Popen[str]:
    """Start a driver, which stays connected until it reads a line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, ray_address],
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@contextmanager
def driver(ray_address: str, **variables: str) -> Iterator[Driver]:
    """Start a driver and wait until it is up; it is killed at the end, if it still runs."""
    with begin(ray_address, **variables) as process:
        try:
            line = process.stdout.readline()
            if not line.startswith("up "):
                process.kill()
            assert line.startswith("up "), line + process.stdout.read()
            yield Driver(process, json.loads(line[3:]))
        finally:
            process.kill()


def ended(
    process: subprocess.Popen[str], line: str | None = None, seconds: float = GONE_SECONDS
) -> str:
    """Let a driver read a line, and return what else it prints, with its exit code."""
    output, _ = process.communicate(line, timeout=seconds)
    return f"{output}exit {process.returncode}"


def assert_gone(processes: list[psutil.Process], folder: Path) -> None:
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not alive
    assert not folder.exists()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A local search, in an environment that points at another Ray and switches tokens off."""
    temporary = tmp_path_factory.mktemp("ray")
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with driver("local", **HOSTILE, RAY_TMPDIR=str(temporary)) as started:
        yield started


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster's address, and the environment of somebody who may use it."""
    with own_ray(2) as (head, login):
        yield head, {k: v for k, v in login.items() if v}


# What a node holds


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "expected"),
    [
        ({"CPU": 5.0}, 2, 0.0, 2),
        ({"CPU": 1.0}, 2, 0.0, 0),
        ({}, 1, 0.0, 0),
        ({"CPU": 8.0, "GPU": 1.0}, 1, 0.4, 2),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.4, 4),  # not 5: a fraction lies within one GPU
        ({"CPU": 80.0, "GPU": 4.0}, 1, 0.1, 40),
        ({"CPU": 3.0, "GPU": 2.0}, 1, 0.5, 3),
        ({"CPU": 8.0, "GPU": 3.0}, 1, 2.0, 1),
        ({"CPU": 8.0}, 1, 1.0, 0),
    ],
)
def test_workers_on_counts_what_fits(
    resources: dict[str, float], cpus: int, gpus: float, expected: int
):
    assert workers_on(resources, cpus, gpus) == expected


# Where a running cluster is


def test_resolve_takes_ray_address_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address.resolve("auto")[0] == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert address.resolve("auto")[0] == "10.0.0.2:6379"
    assert address.resolve("head:6379")[0] == "head:6379"


def test_resolve_says_how_to_start_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"finds no cluster: .* `ray start --head`, or set"):
        address.resolve("auto")


@pytest.mark.parametrize("wrong", ["ray://head:10001", "head", "head:port", "http://head:8265"])
def test_resolve_refuses_what_is_no_head(wrong: str):
    with pytest.raises(ValueError, match=r"must be local, auto or host:port"):
        address.resolve(wrong)


def test_probe_refuses_an_address_where_nobody_listens():
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no Ray cluster answers at 127.0.0.1:9 \(.*refused"):
        address.probe("127.0.0.1:9", {})
    assert time.monotonic() - began < 8


# A local search


@pytest.mark.slow
def test_local_search_runs_beside_a_hostile_environment(local: Driver):
    assert local.found["room"] == 2
    assert local.found["pinned"]
    assert local.found["head"].startswith("127.0.0.1:")


@pytest.mark.slow
def test_local_search_leaves_the_environment_alone(local: Driver):
    names_of_ray = ("RAY_CLIENT_MODE", "RAY_TMPDIR")  # the first set by itself
    environment = {k: v for k, v in local.found["environment"].items() if k not in names_of_ray}
    assert environment == HOSTILE


@pytest.mark.slow
def test_local_search_listens_on_loopback_alone(local: Driver):
    processes = [psutil.Process(local.process.pid), *local.descendants()]
    assert local.found["worker"] in [process.pid for process in processes]
    sockets = [c for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert len(sockets) > 4
    assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.slow
def test_local_search_hides_its_folder(local: Driver):
    folder = local.folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*/session_*/sockets/plasma_store"))


@pytest.mark.slow
def test_local_search_leaves_workers_their_priority(local: Driver):
    assert local.found["nice"] == os.nice(0)


@pytest.mark.slow
@pytest.mark.parametrize("login", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"}])
def test_local_search_lets_no_other_in(local: Driver, login: dict[str, str]):
    with pytest.raises(ValueError, match=r"refuses this token: set RAY_AUTH_MODE=token"):
        address.probe(local.found["head"], {"RAY_AUTH_MODE": None, **login})


@pytest.mark.slow
def test_local_search_leaves_nothing_when_it_ends():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        assert ended(started.process, "end\n") == "exit 0"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_leaves_nothing_when_it_is_killed():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.process.kill()
        assert ended(started.process) == "exit -9"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_leaves_nothing_of_a_ray_that_hangs():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.named("raylet/raylet").suspend()
        started.process.send_signal(signal.SIGTERM)
        assert ended(started.process) == "interrupted\nexit 3"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_leaves_nothing_of_a_worker_that_was_killed():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        assert started.found["child"] in [process.pid for process in processes]
        psutil.Process(started.found["worker"]).kill()
        started.process.kill()
        assert_gone(processes, folder)


# A running cluster


@pytest.mark.slow
def test_running_cluster_is_used_and_left_running(running: tuple[str, dict[str, str]]):
    head, login = running
    for _ in range(2):
        with driver(head, **login) as started:
            assert started.found["room"] == 2
            assert started.found["head"] == head
            assert not started.descendants()
            assert ended(started.process, "end\n") == "exit 0"


@pytest.mark.slow
def test_auto_takes_the_last_started_cluster_and_the_token_that_is_there(
    running: tuple[str, dict[str, str]], tmp_path: Path
):
    head, login = running
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(head)
    variables = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_TOKEN": login["RAY_AUTH_TOKEN"]}
    with driver("auto", **variables) as started:
        assert started.found["head"] == head


@pytest.mark.slow
@pytest.mark.parametrize(
    "login", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}]
)
def test_running_cluster_refuses_a_token_in_one_line(
    running: tuple[str, dict[str, str]], tmp_path: Path, login: dict[str, str]
):
    began = time.monotonic()
    process = begin(running[0], HOME=str(tmp_path), **login)
    assert ended(process, seconds=30) == (
        f"ValueError: the Ray cluster at {running[0]} refuses this token: set RAY_AUTH_MODE=token, "
        "and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's\nexit 2"
    )
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_probe_gives_up_on_what_accepts_and_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        head = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"{head} accepts connections but does not answer"):
            address.probe(head, {"RAY_AUTH_TOKEN": "any"})


# A cluster that is lost; one that is killed is in tests/search/test_search_faults.py


@pytest.mark.slow
def test_cluster_that_hangs_is_said_in_one_line():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.named("gcs_server").suspend()
        said = f"Ray's head at {started.found['head']} has not answered for 10 s"
        assert ended(started.process, seconds=30) == f"LostCluster: {said}\nexit {EXIT_LOST}"
        assert_gone(processes, folder)
