"""Scripts, in this process or as processes: watched, hit by signals, and run to their end."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from prunevolve import command_line

ROOT = Path(__file__).parents[2]
SIZES = [
    *("fitness.windows=6", "fitness.length=64", "calibration.windows=4", "calibration.length=64"),
    *("selection.windows=4", "selection.length=64", "report.windows=4", "report.length=64"),
    *("search.population=12", "search.stages=[2]", "search.lag=4"),
]


def started(script, *words, code=0) -> tuple[str, str]:
    """Run a script in this process, which must end with a code; return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["script", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            command_line.run_to_end(script.app)  # without a guard, which is a process
    assert (end.value.code or 0) == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_search.py"), *arguments]


def launch_command(out: Path, *overrides: str) -> list[str]:
    settings = [f"--set={setting}" for setting in (*SIZES, *overrides)]
    return command("--out", str(out), *settings)


def resume_command(out: Path, *overrides: str) -> list[str]:
    return command("--resume", str(out), *(f"--set={setting}" for setting in overrides))


def run(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    usual = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(arguments, **{**usual, **options})


def figures_of(benchmark: str, folder: Path, *options: object, **more) -> dict:
    figures = folder / "figures.json"
    program = [sys.executable, str(ROOT / "benchmarks" / benchmark), "--json", str(figures)]
    done = run([*program, *map(str, options)], **{"cwd": folder, "timeout": 600, **more})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(figures.read_text())


def begin(arguments: list[str], **options) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, **{**pipes, **options})


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the run ended before it got so far"
        assert time.monotonic() < deadline, "the run did not get on"
        time.sleep(0.002)


def wait_for_lines(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    wait_until(lambda: journal(out).count(b"\n") >= lines, process)


def journal(out: Path) -> bytes:
    path = out / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


def assert_same(out: Path, reference: Path) -> None:
    assert journal(out) == journal(reference)
    best = "best_metric.json"
    assert (out / best).read_bytes() == (reference / best).read_bytes()


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
