import pytest

from pruning import progress
from pruning.progress import Lines, shown_progress, step


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
    lines = Lines()
    for second in range(1, 1001):
        clock[0] = float(second)
        lines.tell("prune", second, 2000)
    told = [line.split("/")[0] for line in capsys.readouterr().err.splitlines()]
    done = [int(line.removeprefix("prune: ")) for line in told]
    assert done[:3] == [3, 6, 9]
    assert done[-1] - done[-2] == 61
    assert len(done) < 60


def test_a_unit_of_work_that_takes_long_is_said_while_it_lasts(clock, capsys):
    lines = Lines()
    lines.beat()  # nothing has begun
    lines.tell("prune", 0, 32)
    clock[0] = 2.0
    lines.beat()
    clock[0] = 2.5
    lines.beat()
    lines.beat()
    assert capsys.readouterr().err == "prune: 0/32, 2 s so far\n"


def test_shown_progress_says_lines_by_itself(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.001)
    said = []
    monkeypatch.setattr(progress, "_say", said.append)
    with shown_progress() as tell:
        tell("prune", 0, 32)
        while not said:
            pass
    assert said[0].startswith("prune: 0/32, ")


def test_the_end_of_a_stage_is_said_with_its_seconds(clock, capsys):
    lines = Lines()
    clock[0] = 1.5
    lines.tell("prune", 1, 1)
    assert capsys.readouterr().err == "prune: 1/1 (1.5 s)\n"
