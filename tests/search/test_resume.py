"""One seed, one journal: with one worker or two, uninterrupted or killed and resumed."""

import json
import random
import signal
from pathlib import Path

import pytest
from search_process import (
    assert_same,
    begin,
    journal,
    launch_command,
    resume_command,
    run,
    wait_for_lines,
)

CANDIDATES = 60
ONE_TASK = ["pruning.group=model"]
TWO_TASKS = [
    *("tasks=[{sparsity: 0.5}, {pattern: 2:4, weight: 2}]", "search.primitives=release"),
    *("search.brood=1", "search.units=off"),
]

pytestmark = pytest.mark.slow


def launch(settings: list[str], out: Path, workers: int) -> list[str]:
    sizes = [f"ray.workers={workers}", f"search.candidates={CANDIDATES}"]
    return launch_command(out, *settings, *sizes)


def kill_at(arguments: list[str], out: Path, lines: int, number: signal.Signals) -> int:
    """Start a run, send a signal once its journal has some lines, return the exit code."""
    with (out.parent / "killed.log").open("a") as log:
        process = begin(arguments, stdout=log, stderr=log)
        wait_for_lines(process, out, lines)
        process.send_signal(number)
        return process.wait(timeout=120)


def reference(settings: list[str], folder: Path) -> Path:
    """The run of one worker, uninterrupted; its outcomes are of many kinds."""
    out = folder / "reference"
    done = run(launch(settings, out, workers=0))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in journal(out).splitlines()]
    assert {line["outcome"] for line in lines} >= {"evaluated", "stopped", "duplicate"}
    assert any(line["parents"] for line in lines)
    return out


def test_journal_is_the_same_for_any_number_of_workers(tmp_path):
    done = run(launch(TWO_TASKS, tmp_path / "run", workers=2))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", reference(TWO_TASKS, tmp_path))


def test_resume_after_every_kind_of_stop_at_random_points_is_the_same(tmp_path):
    out = tmp_path / "run"
    ways = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM]
    points = sorted(random.Random(0).sample(range(3, CANDIDATES - 5), len(ways)))
    arguments = launch(ONE_TASK, out, workers=2)
    for point, number in zip(points, ways, strict=True):
        code = kill_at(arguments, out, point, number)
        assert code == (-number if number == signal.SIGKILL else 3)
        arguments = resume_command(out)
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same(out, reference(ONE_TASK, tmp_path))
