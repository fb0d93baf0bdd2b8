"""Faults of machines and people that hit `run_search.py` itself: one line, 3, and it goes on."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import termios
import time
from contextlib import contextmanager

import psutil
import pytest
from ray_cluster import cluster_of
from search_process import (
    assert_same,
    begin,
    journal,
    launch_command,
    resume_command,
    run,
    wait_for_lines,
)

CANDIDATES = 24
IN_PROCESS = "ray.workers=0"
ENDLESS = "search.candidates=100000"
STOP_SECONDS = 10

pytestmark = pytest.mark.slow


def launch(out, *overrides):
    return launch_command(out, f"search.candidates={CANDIDATES}", *overrides)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A search in one process to its end; its outcomes are of many kinds."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = run(launch(out, IN_PROCESS))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in journal(out).splitlines()]
    assert {line["outcome"] for line in lines} >= {"evaluated", "stopped", "duplicate"}
    assert any(line["parents"] for line in lines)
    return out


def assert_interrupted(process, out, line):
    """See that a search ends with 3, and with the line that says why and how to go on."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "Traceback" not in output
    way_on = f"; continue with python run_search.py --resume {out}"
    assert re.fullmatch(line + way_on, output.splitlines()[-1]), output


def test_search_of_two_workers_stopped_in_any_way_and_resumed_is_the_same(reference, tmp_path):
    out = tmp_path / "run"
    ways = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM]
    points = sorted(random.Random(0).sample(range(3, CANDIDATES - 5), len(ways)))
    arguments = launch(out, "ray.workers=2")
    for point, number in zip(points, ways, strict=True):
        with (tmp_path / "killed.log").open("a") as log:
            process = begin(arguments, stdout=log, stderr=log)
            wait_for_lines(process, out, point)
            process.send_signal(number)
            code = process.wait(timeout=120)
        assert code == (-number if number == signal.SIGKILL else 3)
        arguments = resume_command(out)
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)


def test_search_that_loses_all_nodes_at_once_ends_with_3_and_goes_on_the_same(reference, tmp_path):
    out = tmp_path / "run"
    with cluster_of(tmp_path, num_cpus=1) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        process = begin(launch(out, f"ray.address={cluster.address}", "ray.workers=2", ENDLESS))
        wait_for_lines(process, out, 5)
        for node in cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        assert_interrupted(process, out, r"error: Ray .+")
    candidates = max(CANDIDATES, journal(out).count(b"\n"))
    more = (IN_PROCESS, "ray.address=local", f"search.candidates={candidates}")
    done = run(resume_command(out, *more))
    assert done.returncode == 0, done.stderr
    assert journal(out).startswith(journal(reference))


@contextmanager
def mounted(*arguments):
    """Mount something on a folder, the last argument, and take it away again."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


def test_full_disk_ends_a_search_with_3_and_it_goes_on_when_there_is_room(reference, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=32m", "tmpfs", disk):
        out, filler = disk / "run", disk / "filler"
        process = begin(launch(out, IN_PROCESS))
        wait_for_lines(process, out, 5)
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while file.write(bytes(4096)):
                pass
        assert_interrupted(process, out, r"error: \S+ cannot be written: No space left on device")
        assert b"}\n" in journal(out)
        filler.unlink()
        assert run(resume_command(out)).returncode == 0
        assert_same(out, reference)


def test_folder_that_nobody_may_write_to_ends_a_search_with_3(tmp_path):
    out, read_only = tmp_path / "run", tmp_path / "read-only"
    read_only.mkdir()
    process = begin(launch(out, IN_PROCESS))
    wait_for_lines(process, out, 5)
    # A mount is busy while a file is written through it, so none is until it is read-only.
    with mounted("--bind", out, read_only):
        subprocess.run(["mount", "-o", "remount,bind,ro", read_only], check=True)
        with mounted("--bind", read_only, out):
            assert_interrupted(process, out, r"error: \S+ cannot be written: Read-only file system")
            again = run(resume_command(out))
            assert (again.returncode, again.stderr.count("\n")) == (3, 1), again.stderr
            assert "Read-only file system" in again.stderr


@pytest.mark.parametrize(
    ("seconds", "number"), [(2.0, signal.SIGHUP), (4.0, signal.SIGTERM), (7.0, signal.SIGINT)]
)
def test_search_can_be_stopped_at_any_time(tmp_path, seconds, number):
    out = tmp_path / "run"
    process = begin(launch(out, "ray.workers=1", ENDLESS))
    time.sleep(seconds)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 3, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("interrupted")
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert not alive
    if out.exists():
        assert (out / "config.yaml").exists() or not list(out.iterdir())


TERMINAL = {
    "start_new_session": True,
    "preexec_fn": lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0),
}


@pytest.mark.parametrize(("opened", "options"), [(os.openpty, TERMINAL), (os.pipe, {})])
def test_search_on_a_closed_terminal_or_pipe_ends_with_3_and_a_checkpoint(
    tmp_path, opened, options
):
    out = tmp_path / "run"
    mine, its = opened()
    process = begin(launch(out, IN_PROCESS, ENDLESS), stdout=its, stderr=its, **options)
    os.close(its)
    while journal(out).count(b"\n") < 5:
        os.read(mine, 65536)  # a terminal that nobody reads is soon full
    os.close(mine)
    assert process.wait(timeout=60) == 3
    assert (out / "checkpoint.json").exists()
