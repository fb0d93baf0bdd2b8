"""How a search is connected to Ray: a driver in a process of its own, and a real Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import search_process
from prunevolve.search.pool.ray_process import workers_on
from search_process import ROOT
from toy_setup import embedded_setup

from prunevolve.configs.schema import Ray
from prunevolve.search.pool.on_ray import ray_backend

FOLDERS = Path("/tmp")
GONE_SECONDS = 10
"""Within which an exit, or the end after one, has to come; it takes half a second when idle."""

HOSTILE = {"RAY_ADDRESS": "nowhere:1", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "known"}
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
DRIVER = "from ray_driver import main; main()"


@dataclass
class Driver:
    process: subprocess.Popen[str]
    found: dict[str, object]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ray_process(self) -> psutil.Process:
        (process,) = psutil.Process(self.process.pid).children()
        return process

    def folder(self) -> Path:
        (folder,) = FOLDERS.glob(f"prunevolve-{self.ray_process().pid}-*")
        return folder

    def named(self, part: str) -> psutil.Process:
        return next(p for p in self.descendants() if part in p.cmdline()[0])


def begin(address, **variables):
    """Start a driver, which stays connected until it reads a line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    settings = {**environment, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", DRIVER, address]
    process = search_process.begin(command, env=settings, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    return process


@contextmanager
def driver(address, **variables):
    """Start a driver and wait until it is up; it is killed at the end, if it still runs."""
    with begin(address, **variables) as process:
        try:
            line = process.stdout.readline()
            if not line.startswith("up "):
                process.kill()
            assert line.startswith("up "), line + process.stdout.read()
            yield Driver(process, json.loads(line[3:]))
        finally:
            process.kill()


def ended(process, line=None, seconds=GONE_SECONDS):
    """Let a driver read a line, and return what else it prints, with its exit code."""
    output, _ = process.communicate(line, timeout=seconds)
    return f"{output}exit {process.returncode}"


def assert_gone(processes, folder):
    _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
    assert not alive
    deadline = time.monotonic() + GONE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not folder.exists()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A local search with one worker, in an environment that points at another Ray."""
    temporary = tmp_path_factory.mktemp("ray")
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with driver("local", **HOSTILE, RAY_TMPDIR=str(temporary), MOST_WORKERS="1") as started:
        yield started


@pytest.fixture(scope="module")
def running(local):
    """A cluster that wants a token, one of whose cores is taken, and what lets one in."""
    token = local.ray_process().environ()["RAY_AUTH_TOKEN"]
    return local.found["head"], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def refusal(address):
    with pytest.raises(ValueError) as error, ray_backend(embedded_setup(), Ray(address=address)):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "expected"),
    [
        ({"CPU": 5.0}, 2, 0.0, 2),
        ({}, 1, 0.0, 0),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.4, 4),  # not 5: a fraction lies within one GPU
        ({"CPU": 80.0, "GPU": 4.0}, 1, 0.1, 40),
        ({"CPU": 3.0, "GPU": 2.0}, 1, 0.5, 3),
        ({"CPU": 8.0, "GPU": 3.0}, 1, 2.0, 1),
    ],
)
def test_workers_on_counts_what_fits(resources, cpus, gpus, expected):
    assert workers_on(resources, cpus, gpus) == expected


def test_auto_takes_ray_address_before_the_file_or_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "finds no cluster: RAY_ADDRESS is not set" in refusal("auto")
    assert "start one with `ray start --head`, or set ray.address=local" in refusal("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:8")
    assert refusal("auto").startswith("no Ray cluster answers at 127.0.0.1:8 ")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert refusal("auto").startswith("no Ray cluster answers at 127.0.0.1:9 ")


@pytest.mark.parametrize("wrong", ["ray://head:10001", "head", "head:port", "http://head:8265"])
def test_address_that_is_no_head_is_refused(wrong):
    assert f"ray.address {wrong!r} must be local, auto or host:port" in refusal(wrong)


@pytest.mark.slow
def test_local_search_runs_beside_a_hostile_environment_and_leaves_it_alone(local):
    environment = {k: v for k, v in local.found["environment"].items() if k != "RAY_TMPDIR"}
    assert environment == HOSTILE
    assert local.found["nice"] == os.nice(0)


@pytest.mark.slow
def test_local_search_listens_on_loopback_alone_and_hides_its_folder(local):
    assert local.found["head"].startswith("127.0.0.1:")
    processes = [psutil.Process(local.process.pid), *local.descendants()]
    assert local.found["worker"] in [process.pid for process in processes]
    sockets = [c for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert len(sockets) > 4
    assert {c.laddr.ip for c in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    folder = local.folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.glob("*/session_*/sockets/plasma_store"))


@pytest.mark.slow
def test_local_search_leaves_nothing_when_it_is_killed():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        assert started.found["child"] in [process.pid for process in processes]
        started.process.kill()
        assert ended(started.process) == "exit -9"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_leaves_nothing_of_a_ray_that_hangs():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        for part in ("raylet/raylet", "gcs_server"):
            started.named(part).suspend()
        time.sleep(3)
        started.process.kill()
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_whose_ray_process_is_killed_says_so_and_leaves_nothing():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.ray_process().kill()
        line = "PoolError: Ray (local) failed: the process that is connected to it was killed"
        assert ended(started.process) == f"{line}\nexit 2"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_local_search_that_was_killed_with_its_ray_process_is_cleared_by_the_next():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.process.send_signal(signal.SIGSTOP)
        started.ray_process().kill()
        started.process.kill()
    with driver("local") as started:
        assert_gone(processes, folder)
        processes, folder = started.descendants(), started.folder()
        assert ended(started.process, "end\n") == "exit 0"
        assert_gone(processes, folder)


@pytest.mark.slow
def test_running_cluster_is_used_and_left_running(running, tmp_path):
    head, login = running
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(head)
    token = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_TOKEN": login["RAY_AUTH_TOKEN"]}
    for address, variables in ((head, login), ("auto", token)):
        with driver(address, **variables) as started:
            assert started.found["room"] == os.cpu_count() - 1
            assert started.found["head"] == head
            assert ended(started.process, "end\n") == "exit 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "login", [{}, {"RAY_AUTH_MODE": "token"}, {**WRONG, "RAY_AUTH_TOKEN": "wrong"}, WRONG]
)
def test_running_cluster_refuses_a_token_in_one_line(running, tmp_path, login):
    head, _ = running
    with begin(head, HOME=str(tmp_path), **login) as process:
        assert ended(process, seconds=60) == (
            f"ValueError: the Ray cluster at {head} refuses this token: set RAY_AUTH_MODE=token,"
            " and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's\nexit 2"
        )


@pytest.mark.slow
def test_head_that_accepts_and_does_not_answer_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        head = f"127.0.0.1:{mute.getsockname()[1]}"
        assert refusal(head).startswith(
            f"Ray ({head}) failed: it accepts connections but does not answer"
        )


@pytest.mark.slow
def test_cluster_that_hangs_is_said_in_one_line():
    with driver("local") as started:
        processes, folder = started.descendants(), started.folder()
        started.named("gcs_server").suspend()
        line = "PoolError: Ray (local) has not answered for 20 s"
        assert ended(started.process, seconds=60) == f"{line}\nexit 2"
        assert_gone(processes, folder)
