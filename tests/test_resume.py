"""One seed, one journal: with one worker or two, uninterrupted or killed and resumed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CANDIDATES = 60
ROOT = Path(__file__).parents[1]
SMALL = [
    *("fitness.windows=6", "fitness.length=64", "calibration.windows=4", "calibration.length=64"),
    *("selection.windows=4", "selection.length=64", "report.windows=4", "report.length=64"),
    *("search.population=12", "search.stages=[2]", "search.lag=4", "search.checkpoint_every=10"),
    f"search.candidates={CANDIDATES}",
]
VARIANTS = {
    "extended": ["pruning.group=free", "search.primitives=extended", "search.patience=10"],
    "two tasks": ["tasks=[{sparsity: 0.5}, {pattern: 2:4, weight: 2}]"],
}

pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_search.py"), *arguments]


def launch_command(variant: str, out: Path, workers: int) -> list[str]:
    changes = [*SMALL, *VARIANTS[variant], f"ray.workers={workers}"]
    settings = [f"--set={setting}" for setting in changes]
    return command("--out", str(out), *settings)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)


def kill_at(arguments: list[str], out: Path, lines: int, number: signal.Signals) -> int:
    """Start a run, send a signal once its journal has some lines, return the exit code."""
    with (out.parent / "killed.log").open("a") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while len(journal(out).splitlines()) < lines:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run did not get on"
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=120)


def journal(out: Path) -> bytes:
    path = out / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def reference(variant, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    done = run(launch_command(variant, out, workers=0))
    assert done.returncode == 0, done.stderr
    return out


def assert_same(out: Path, reference: Path) -> None:
    assert journal(out) == journal(reference)
    best = "best_metric.json"
    assert (out / best).read_bytes() == (reference / best).read_bytes()


def test_the_reference_is_of_many_kinds(variant, reference):
    """Else the others would compare too little."""
    lines = [json.loads(line) for line in journal(reference).splitlines()]
    assert {line["outcome"] for line in lines} >= {"evaluated", "stopped", "duplicate"}
    assert {line["group"] for line in lines} == {"row", "layer", "model"}
    assert any(line["parents"] for line in lines)
    began = json.loads((reference / "checkpoint.json").read_text())["began"]
    assert (began > 0) == (variant == "extended")  # a new population, for want of patience


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_journal(variant, reference, tmp_path, workers):
    done = run(launch_command(variant, tmp_path / "run", workers))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", reference)


def test_killed_at_three_random_points_and_resumed_is_the_same(variant, reference, tmp_path):
    out = tmp_path / "run"
    points = sorted(random.Random(0).sample(range(3, CANDIDATES - 5), 3))
    arguments = launch_command(variant, out, workers=2)
    for point in points:
        assert kill_at(arguments, out, point, signal.SIGKILL) == -signal.SIGKILL
        arguments = command("--resume", str(out))
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)


@pytest.mark.parametrize("variant", ["extended"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_exits_3_with_a_checkpoint_and_resumes_the_same(
    variant, reference, tmp_path, number
):
    out = tmp_path / "run"
    assert kill_at(launch_command(variant, out, workers=1), out, 20, number) == 3
    assert (out / "checkpoint.json").exists()
    done = run(command("--resume", str(out)))
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)


def test_extended_run_keeps_its_beginning(variant, reference, tmp_path):
    out = tmp_path / "run"
    shorter = [*launch_command(variant, out, workers=0), "--set=search.candidates=40"]
    assert run(shorter).returncode == 0
    done = run(command("--resume", str(out), f"--set=search.candidates={CANDIDATES}"))
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)
