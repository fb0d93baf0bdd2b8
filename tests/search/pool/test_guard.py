"""A light driver below its guard, on a real local Ray: nothing is left, whichever process dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import search_process
from search_process import ROOT

from prunevolve.configs.schema import Ray
from prunevolve.search.pool.cluster import connected

GONE_SECONDS = 30
WAY_ON = "go on like this"
DRIVER = "from ray_driver import main; main()"


@dataclass
class Running:
    guard: subprocess.Popen[str]
    facts: dict[str, object]

    def __post_init__(self):
        self.driver = psutil.Process(self.facts["driver"])
        self.processes = [self.driver, *self.driver.children(recursive=True)]
        folders = list(Path("/tmp").glob(f"prunevolve-{self.driver.pid}-*"))
        self.folder = folders[0] if folders else Path("/nowhere")

    def named(self, part):
        return next(p for p in self.processes if part in p.cmdline()[0])

    def ended(self, line=None, seconds=GONE_SECONDS):
        """Let the driver read a line; return the guard's exit code and the last line."""
        output, _ = self.guard.communicate(line, timeout=seconds)
        return self.guard.returncode, (output.splitlines() or [""])[-1]

    def assert_nothing_left(self):
        _, alive = psutil.wait_procs(self.processes, timeout=GONE_SECONDS)
        assert not alive
        search_process.until(lambda: not self.folder.exists(), GONE_SECONDS)


def begin(address, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    process = search_process.begin(
        [sys.executable, "-c", DRIVER, address],
        env={**environment, "PYTHONPATH": path, **variables},
        stdin=subprocess.PIPE,
        process_group=0,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@contextmanager
def driver(address="local", **variables):
    with begin(address, **variables) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("up "), line
            yield Running(process, json.loads(line[3:]))
        finally:
            process.kill()


SILENT = f"error: Ray has not answered for 20 s or more; {WAY_ON}"
KILLED = f"error: the search was killed by SIGKILL; {WAY_ON}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victims", "code", "last"),
    [
        (("driver",), 3, KILLED),
        (("guard",), -9, "interrupted"),
        (("guard", "driver"), -9, ".*"),
        (("group",), -9, "interrupted"),
        ((), 0, ""),
        # Whoever notices first: the driver, or Ray, which ends it.
        (("raylet",), 3, "(Resumable: Ray .* is gone|error: Ray ended the search).*"),
        (("head",), 3, SILENT),
        (("head that hangs",), 3, SILENT),
    ],
)
def test_nothing_is_left_whichever_process_is_killed_or_none(victims, code, last):
    with driver() as run:
        acts = {
            "guard": run.guard.kill,
            "group": lambda: os.killpg(run.guard.pid, signal.SIGKILL),
            "driver": run.driver.kill,
            "raylet": lambda: run.named("raylet/raylet").kill(),
            "head": lambda: run.named("gcs_server").kill(),
            "head that hangs": lambda: run.named("gcs_server").suspend(),
        }
        assert {run.facts["worker"], run.facts["child"]} <= {p.pid for p in run.processes}
        for victim in victims:
            acts[victim]()
        ended = run.ended(None if victims else "end\n", seconds=60)
        assert ended[0] == code
        assert re.fullmatch(last, ended[1])
        run.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "ended"), [("answers", (0, "")), ("", (3, f"{SILENT}\n".replace("20 s", "1 s")))]
)
def test_driver_that_is_slow_to_start_is_ended_only_if_ray_does_not_answer(word, ended):
    code = f"""
import sys, time
from prunevolve.search.pool import guard
guard.SILENCE_SECONDS, guard._JOIN_SECONDS = 1.0, 2.0

def drive():
    guard.tell("resume {WAY_ON}")
    guard.tell("joins")
    for _ in range(16):
        time.sleep(0.25)
        guard.tell({word!r}) if {word!r} else None
    sys.exit(0)

guard.around(drive)
"""
    done = search_process.run([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == ended


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_second_signal_ends_a_search_at_once(seconds):
    with begin("local") as process:
        time.sleep(seconds)
        (driver,) = psutil.Process(process.pid).children()
        processes = [driver, *driver.children(recursive=True)]
        driver.suspend()  # it cannot hear the first
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10)
        assert (process.returncode, output) == (3, f"interrupted; {WAY_ON}\n")
        _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
        assert not alive
        search_process.until(lambda: not list(Path("/tmp").glob(f"prunevolve-{driver.pid}-*")), 30)


# Which Ray is started or joined, and what is said if it cannot be

HOSTILE = {"RAY_ADDRESS": "nowhere:1", "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "known"}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A local Ray in an environment that points at another one; its one worker has a core."""
    temporary = tmp_path_factory.mktemp("ray")
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    with driver("local", **HOSTILE, RAY_TMPDIR=str(temporary)) as started:
        yield started


def refusal(address):
    with pytest.raises(ValueError) as error, connected(Ray(address=address)):
        pass
    return str(error.value)


def test_auto_takes_ray_address_before_the_file_or_says_how_to_start_one(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert refusal("auto").startswith("no Ray cluster answers at any known address (ray.address ")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:8")
    assert refusal("auto").startswith("no Ray cluster answers at 127.0.0.1:8 ")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert refusal("auto").startswith("no Ray cluster answers at 127.0.0.1:9 ")
    message = refusal("head:1")
    assert message.startswith("no Ray cluster answers at head:1 (")
    assert message.endswith(
        "`ray start --head`, which prints its host:port, or set ray.address=local"
    )


def test_driver_that_fails_before_ray_says_itself_what_was_wrong():
    code = "from prunevolve.search.pool import guard; guard.around(lambda: 1 / 0)"
    done = search_process.run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.slow
def test_local_ray_has_its_own_token_listens_on_loopback_alone_and_hides_its_folder(local):
    assert len(local.facts["token"]) == 64
    assert local.facts["head"].startswith("127.0.0.1:")
    assert local.facts["nice"] == os.nice(0)
    sockets = [c for p in local.processes for c in p.net_connections("inet")]
    listening = {c.laddr.ip for c in sockets if c.status == "LISTEN"}
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert local.folder.stat().st_mode & 0o777 == 0o700
    assert list(local.folder.glob("*/session_*/sockets/plasma_store"))


@pytest.mark.slow
def test_running_cluster_is_used_and_left_running(local, tmp_path):
    head, token = local.facts["head"], local.facts["token"]
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(head)
    variables = {"RAY_TMPDIR": str(tmp_path), "RAY_AUTH_TOKEN": token}
    with driver("auto", **variables) as started:
        assert (started.facts["head"], started.facts["room"]) == (head, os.cpu_count())
        assert started.ended("end\n")[0] == 0
    assert all(p.is_running() for p in local.processes if psutil.pid_exists(p.pid))
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with begin(head, **wrong) as process:
        output, _ = process.communicate(timeout=60)
    line = f"ValueError: the Ray cluster at {head} refuses this token: set RAY_AUTH_MODE=token, and"
    assert (process.returncode, output.count("\n")) == (3, 1)
    assert output.startswith(line)
