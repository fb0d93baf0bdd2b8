"""How a script ends early: by a signal, by an unreachable hub, by a reader that leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import NOTHING_WRITTEN, interruptible

ROOT = Path(__file__).parents[1]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PRUNE = ("run_prune.py", "--model", "embedded", "--metric", "wanda", "--out", "out")


def run(tmp_path, *words, **environment):
    """Run a script in a process of its own and in an empty folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_interruptible_raises_at_the_first_signal_and_leaves_the_second_to_python(number):
    own = signal.getsignal(number)
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signal.getsignal(number) == own
    assert signal.getsignal(number) == own


def test_interruptible_lets_nohup_ignore_a_closed_terminal():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("words", [("run_search.py", "--out", "out", "--json"), PRUNE])
def test_signal_while_torch_is_imported_ends_in_one_line_and_3(tmp_path, words, number):
    # In the module's place stands one that is hit by the signal.
    (tmp_path / "torch.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(30)\n"
    )
    done = run(tmp_path, *words)
    assert done.returncode == 3
    assert "interrupted" in done.stderr and len(done.stderr.splitlines()) == 1
    told = f'"reason": "interrupted", "error": "{NOTHING_WRITTEN}"'
    assert told in done.stdout if "--json" in words else not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unreachable_hub_is_one_line(tmp_path):
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = run(tmp_path, "run_search.py", "--set", "model=owner/name", **settings)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model 'owner/name' cannot be loaded: give 'embedded', a ")


@pytest.mark.slow
def test_prune_into_a_closed_pipe_ends_with_3_and_goes_on(tmp_path):
    words = [sys.executable, *PRUNE[:-1], str(tmp_path / "out"), "--samples", "64"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    while not process.stdout.readline().startswith("plan: "):
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=300) == 3
    assert subprocess.run([*words, "--resume"], cwd=ROOT, timeout=300).returncode == 0
