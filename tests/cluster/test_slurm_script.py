"""`cluster/slurm.sh`, with stubs for the commands that it calls, which log what they are given."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = {
    "python": """
        [ "$1" = -c ] && exec echo token
        echo "python $*" >> "$CALLS"
        [ -n "$CODE" ] && exit "$CODE"
        trap 'exit 3' TERM
        echo "waiting $$" >> "$CALLS"
        for _ in $(seq 200); do sleep 0.05; done""",
    "ray": 'echo "ray $*" >> "$CALLS"',
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        exec "$@" """,
    "scontrol": """
        [ "$1" = getaddrs ] && exec echo "$2: 192.0.2.1:6818"
        echo "scontrol $*" >> "$CALLS" """,
    "squeue": 'echo "$STATE"',
}
SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "first", "SLURM_JOB_NUM_NODES": "2"},
    "SLURM_CPUS_PER_TASK": "1",
}


@pytest.fixture
def start(tmp_path):
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    def run(code="", state="RUNNING", **more):
        environment = {**os.environ, **SLURM, **here, "CODE": code, "STATE": state, **more}
        command = [ROOT / "cluster/slurm.sh", tmp_path / "run", "--config", "some.yaml"]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    return run


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(("code", "restarts"), [("2", "0"), ("3", "100")])
def test_job_is_not_requeued_after_a_mistake_or_too_often(start, tmp_path, code, restarts):
    process = start(code, SLURM_RESTART_COUNT=restarts)
    assert process.wait(timeout=30) == int(code)
    assert "scontrol requeue" not in calls(tmp_path)


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_sigterm_reaches_the_search_once_and_its_exit_code_comes_back(start, tmp_path, state):
    """That of scancel is not handed on, since the search has it too."""
    process = start(state=state)
    deadline = time.monotonic() + 30
    while not (waiting := re.search(r"waiting (\d+)\n", calls(tmp_path))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # the script sets its trap right after it has started the search
    process.send_signal(signal.SIGTERM)
    if state == "COMPLETING":
        time.sleep(0.5)
        assert process.poll() is None
        os.kill(int(waiting[1]), signal.SIGTERM)
    assert process.wait(timeout=30) == 3
    assert ("scontrol requeue 7" in calls(tmp_path)) is (state == "RUNNING")


def test_first_start_launches_and_the_next_resumes(start, tmp_path):
    start("3").wait(timeout=30)
    search = f"{tmp_path / 'run'} --set ray.address=192.0.2.1:6379"
    assert f"python run_search.py --out {search} --config some.yaml" in calls(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    start("0").wait(timeout=30)
    assert f"python run_search.py --resume {search}\n" in calls(tmp_path)
    assert calls(tmp_path).count("scontrol requeue 7") == 1  # the first could go on
