import io
from contextlib import redirect_stderr

import pytest

from prunevolve.pruning import progress
from prunevolve.pruning.progress import Lines, shown_progress, step


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the module sees; set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_grow_rarer_the_longer_a_stage_takes(clock, capsys):
    lines = Lines()
    for second in range(1, 1001):
        clock[0] = float(second)
        lines.tell("prune", second, 2000)
    told = [line.split("/")[0] for line in capsys.readouterr().err.splitlines()]
    done = [int(line.removeprefix("prune: ")) for line in told]
    assert done[:3] == [3, 6, 9]
    assert done[-1] - done[-2] == 61
    assert len(done) < 60


def test_shown_progress_says_only_the_end_of_a_stage_with_its_seconds(clock, capsys):
    with step("reading"), shown_progress() as tell:
        clock[0] = 1.5
        tell("prune", 1, 1)
    assert capsys.readouterr() == ("", "prune: 1/1 (1.5 s)\n")


def test_progress_is_shown_where_what_a_library_prints_is_dropped(clock, capsys):
    with shown_progress() as tell, redirect_stderr(io.StringIO()):
        tell("prune", 1, 1)
    assert capsys.readouterr().err == "prune: 1/1 (0.0 s)\n"
