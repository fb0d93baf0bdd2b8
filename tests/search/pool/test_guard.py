"""Whichever process of a search dies, nothing is left, and who can still speak says how to go on.

A light driver below its guard, with a real local Ray and one actor in place of a worker.
"""

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

GONE_SECONDS = 30
WAY_ON = "go on like this"
DRIVER = "from ray_driver import main; main()"


@dataclass
class Running:
    """A guard, its driver and all of their processes."""

    guard: subprocess.Popen[str]
    facts: dict[str, object]

    def __post_init__(self):
        self.driver = psutil.Process(self.facts["driver"])
        self.processes = [self.driver, *self.driver.children(recursive=True)]
        (self.folder,) = Path("/tmp").glob(f"prunevolve-{self.driver.pid}-*")

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
    """Start a driver and wait until it is up; it is killed at the end, if it still runs."""
    with begin(address, **variables) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("up "), line
            yield Running(process, json.loads(line[3:]))
        finally:
            process.kill()


@pytest.mark.slow
def test_local_ray_ends_with_its_driver_and_leaves_nothing():
    with driver() as run:
        assert {run.facts["worker"], run.facts["child"]} <= {p.pid for p in run.processes}
        assert run.ended("end\n")[0] == 0
        run.assert_nothing_left()


KILLED = f"error: the search was killed by SIGKILL; {WAY_ON}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victims", "code", "last"),
    [
        (("driver",), 3, KILLED),
        (("guard",), -9, "interrupted"),
        (("guard", "driver"), -9, ".*"),
        (("group",), -9, "interrupted"),
        # Whoever notices first: the driver, or Ray, which ends it.
        (("raylet/raylet",), 3, "(PoolError: Ray .* is gone|error: Ray ended the search).*"),
        (("gcs_server",), 3, f"error: Ray has not answered for 20 s; {WAY_ON}"),
    ],
)
def test_nothing_is_left_whichever_process_is_killed(victims, code, last):
    with driver() as run:
        for victim in victims:
            match victim:
                case "guard":
                    run.guard.kill()
                case "group":
                    os.killpg(run.guard.pid, signal.SIGKILL)
                case "driver":
                    run.driver.kill()
                case part:
                    run.named(part).kill()
        ended = run.ended(seconds=60)
        assert ended[0] == code
        assert re.fullmatch(last, ended[1])
        run.assert_nothing_left()


@pytest.mark.slow
def test_head_that_hangs_ends_the_search_with_one_line():
    with driver() as run:
        run.named("gcs_server").suspend()
        began = time.monotonic()
        assert run.ended(seconds=60) == (3, f"error: Ray has not answered for 20 s; {WAY_ON}")
        assert time.monotonic() - began < 30
        run.assert_nothing_left()


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
        assert (process.returncode, output) == (3, f"interrupted twice; {WAY_ON}\n")
        _, alive = psutil.wait_procs(processes, timeout=GONE_SECONDS)
        assert not alive
        search_process.until(lambda: not list(Path("/tmp").glob(f"prunevolve-{driver.pid}-*")), 30)
