import pytest

from pruning import progress
from pruning.progress import shown_progress, step


def test_a_step_says_nothing_while_it_is_short(capsys):
    with step("reading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_step_is_said_once_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    said = []
    monkeypatch.setattr(progress.sys.stderr, "flush", lambda: said.append(True))
    with step("reading"):
        while not said:
            pass
    assert capsys.readouterr() == ("", "reading ...\n")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the module sees; set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_progress_grow_rarer_the_longer_a_stage_takes(clock, capsys):
    with shown_progress() as tell:
        for second in range(1, 1001):
            clock[0] = float(second)
            tell("prune", second, 2000)
    told = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert told[:3] == [3, 6, 9]
    assert told[-1] - told[-2] == 61
    assert len(told) < 60


def test_the_end_of_a_stage_is_said_with_its_seconds(clock, capsys):
    with shown_progress() as tell:
        clock[0] = 1.5
        tell("prune", 1, 1)
    assert capsys.readouterr().err == "prune: 1/1 (1.5 s)\n"
