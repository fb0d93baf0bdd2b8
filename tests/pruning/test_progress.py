"""What is shown of the work: lines, bars, spinners, and what happens if nobody reads them."""

import io
import os

import pytest

from prunevolve.pruning import progress
from prunevolve.pruning.progress import PlainConsole, shown_progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the module sees; set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_grow_rarer_the_longer_a_stage_takes(clock):
    plain = PlainConsole(io.StringIO())
    with shown_progress(plain) as show:
        for second in range(1, 1001):
            clock[0] = float(second)
            show("prune", second, 2000)
    assert 10 < len(plain.file.getvalue().splitlines()) < 60


def test_line_says_what_is_left_at_the_pace_since_the_stage_began(clock):
    plain = PlainConsole(io.StringIO())
    with shown_progress(plain) as show:
        show("candidates", 40, 90)  # these were there before
        clock[0] = 60.0
        show("candidates", 50, 90, ["best: W", "2 workers"])
        show("candidates", 51, 90)
    line = "candidates: 50/90, 0:01:00 so far, 0:04:00 left; best: W; 2 workers\n"
    assert plain.file.getvalue() == line


def test_console_raises_broken_pipe_error_when_its_reader_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError), open(writer, "w") as file:  # noqa: PTH123
        PlainConsole(file).print("anybody there?")
