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
VARIANTS = {
    "one task": ["pruning.group=model", "search.patience=10"],
    "two tasks": [
        *("tasks=[{sparsity: 0.5}, {pattern: 2:4, weight: 2}]", "search.primitives=release"),
        *("search.brood=1", "search.units=off"),
    ],
}

pytestmark = pytest.mark.slow


def launch(variant: str, out: Path, workers: int, candidates: int = CANDIDATES) -> list[str]:
    sizes = [f"ray.workers={workers}", f"search.candidates={candidates}"]
    return launch_command(out, *VARIANTS[variant], *sizes)


def kill_at(arguments: list[str], out: Path, lines: int, number: signal.Signals) -> int:
    """Start a run, send a signal once its journal has some lines, return the exit code."""
    with (out.parent / "killed.log").open("a") as log:
        process = begin(arguments, stdout=log, stderr=log)
        wait_for_lines(process, out, lines)
        process.send_signal(number)
        return process.wait(timeout=120)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def reference(variant, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "run"
    done = run(launch(variant, out, workers=0))
    assert done.returncode == 0, done.stderr
    return out


def test_reference_has_outcomes_of_many_kinds(variant, reference):
    """Else the others would compare too little."""
    lines = [json.loads(line) for line in journal(reference).splitlines()]
    assert {line["outcome"] for line in lines} >= {"evaluated", "stopped", "duplicate"}
    assert any(line["parents"] for line in lines)
    began = json.loads((reference / "checkpoint.json").read_text())["began"]
    assert (began > 0) == (variant == "one task")  # a new population, for want of patience


def test_journal_is_the_same_for_any_number_of_workers(variant, reference, tmp_path):
    done = run(launch(variant, tmp_path / "run", workers=2))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("variant", ["one task"], indirect=True)
def test_resume_after_every_kind_of_stop_at_random_points_is_the_same(variant, reference, tmp_path):
    out = tmp_path / "run"
    ways = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM]
    points = sorted(random.Random(0).sample(range(3, CANDIDATES - 5), len(ways)))
    arguments = launch(variant, out, workers=2)
    for point, number in zip(points, ways, strict=True):
        code = kill_at(arguments, out, point, number)
        assert code == (-number if number == signal.SIGKILL else 3)
        arguments = resume_command(out)
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)


@pytest.mark.parametrize("variant", ["one task"], indirect=True)
def test_resume_with_more_candidates_keeps_the_beginning(variant, reference, tmp_path):
    out = tmp_path / "run"
    assert run(launch(variant, out, workers=0, candidates=40)).returncode == 0
    done = run(resume_command(out, f"search.candidates={CANDIDATES}"))
    assert done.returncode == 0, done.stderr
    assert_same(out, reference)
