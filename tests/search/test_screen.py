"""What a person sees while a search goes on: the table, the lines, and how long steps take."""

import io
import re
import time

import pytest
from rich.console import Console

from prunevolve.search import screen
from prunevolve.search.screen import Status, duration, shown, step, tables_of

METRIC = "mul(mul(abs(W), sqrt(X)), add(G, X))"


def status(**changes) -> Status:
    values = {
        **{"state": "running", "written": "2026-01-01T00:00:00+00:00", "trouble": ""},
        **{"candidates": 30, "of": 90, "outcomes": {"evaluated": 30}, "per_hour": 3600.0},
        **{"workers": {"ready": 2, "busy": 1, "starting": 0}, "faults": {}, "groups": {"row": 8}},
        "best": {"metric": METRIC, "group": "row", "fitness": 3.3, "unit": "nats/token"},
        **{"seconds": 30.0, "known": {"dense": 3.1, "wanda": 3.4}},
    }
    return Status(**values | changes)


def printed(shown: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()


def test_table_shows_dense_and_the_best_named_beside_the_best():
    text = printed(tables_of(status(), 100), 100)
    for name, fitness in (("dense", "3.1000"), ("wanda", "3.4000"), ("best", "3.3000")):
        assert re.search(rf"│ {name} +│ +{fitness} │", text)
    assert METRIC in text
    assert re.search(r"elapsed +│ 30 s", text)
    assert re.search(r"left +│ 1 min 0 s", text)


@pytest.mark.parametrize(("width", "columns"), [(100, 4), (60, 3), (40, 2)])
def test_table_drops_columns_when_narrow_and_cuts_no_word(width, columns):
    text = printed(tables_of(status(), width), width)
    row = next(line for line in text.splitlines() if "3.3000" in line)
    assert row.count("│") == columns + 1
    assert "…" not in text
    for word in ("dense", "wanda", "nats/token", "candidate", "population", "evaluated"):
        assert word in text


def test_plain_line_tells_the_same_as_the_table(monkeypatch):
    monkeypatch.setattr(screen, "_PLAIN_SECONDS", 0)
    console = Console(file=io.StringIO())
    with shown(console) as show:
        show(status())
    line = console.file.getvalue()
    assert line.startswith("candidate 30/90  dense 3.1000, wanda 3.4000, best 3.3000  elapsed 30 s")
    assert "left 1 min 0 s" in line


def test_duration_is_as_a_person_says_it():
    said = {0.4: "0 s", 59.4: "59 s", 59.6: "1 min 0 s", 754: "12 min 34 s", 3600: "1 h 0 min"}
    for seconds, expected in {**said, 12060: "3 h 21 min", 190000: "2 d 4 h"}.items():
        assert duration(seconds) == expected


def test_step_tells_how_far_it_is_in_plain_lines(monkeypatch):
    monkeypatch.setattr(screen, "_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(screen, "_PLAIN_SECONDS", 0.01)
    console = Console(file=io.StringIO())

    def wait_for(text):
        deadline = time.monotonic() + 20
        while text not in console.file.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    with step(console, "measuring", 3) as going:
        going.advance()
        wait_for("measuring: 1 of 3, 0 s\n")
        going.at("backward", 2, 4)
        wait_for("measuring: backward 2 of 4, 0 s\n")


def test_step_is_one_line_if_short_and_none_if_it_fails():
    console = Console(file=io.StringIO())
    with step(console, "reading"):
        pass
    with pytest.raises(ValueError, match="no text"), step(console, "cutting"):
        raise ValueError("no text")
    assert console.file.getvalue() == "reading: 0 s\n"


def test_step_on_a_terminal_shows_its_parts():
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    with step(console, "measuring", 3) as going:
        going.advance()
    assert "measuring: 1 of 3, 0 s" in console.file.getvalue()
