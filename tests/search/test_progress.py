"""What a run says of its status, in lines and for trackers; see also test_run_search."""

import io
import re
import time
from types import SimpleNamespace

from report_run import STATUS

from prunevolve.pruning.progress import PlainConsole
from prunevolve.search.evolution import State
from prunevolve.search.progress import Recorder, ignore, lines_of, values_of


def test_lines_say_the_best_beside_what_is_known_and_all_counts():
    assert lines_of(STATUS) == [
        "fitness: dense 0, best baseline 1, best 0.9000",
        "best: mul(W, X), group row",
        "outcomes: 28 evaluated, 0 stopped, 2 failed",
        "workers: 2 ready, 1 busy, 0 starting; 3600 candidates an hour",
        "faults: 3 lost; the last: lost: it ended",
    ]


def test_lines_and_values_before_anything_is_evaluated():
    first, *others = lines_of({**STATUS, "best": None, "faults": {}})
    assert first == "fitness: dense 0, best baseline 1, best none yet"
    assert [line.split(":")[0] for line in others] == ["outcomes", "workers"]
    assert "fitness/best" not in values_of({**STATUS, "best": None})


def test_candidates_an_hour_are_those_shown_by_the_seconds_beside_them(monkeypatch):
    # Its process began 9 s ago, and the run, in another one, 27 s before that.
    clock, screen = 1000.0, io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    evolution = SimpleNamespace(done=False, state=State(committed=60), resumable=State())
    workers = SimpleNamespace(ready=1, busy=1, starting=0, faults={}, trouble="")
    search = SimpleNamespace(candidates=120)
    experiment = SimpleNamespace(config=SimpleNamespace(tensorboard=False, search=search))
    folder = SimpleNamespace(write_json=lambda *_: None, write_hall_of_fame=lambda *_: None)
    pool = SimpleNamespace(workers=workers, scale=SimpleNamespace(baselines={}))
    console = PlainConsole(file=screen)
    with Recorder(folder, experiment, evolution, pool, console, ignore, clock - 27) as recorder:
        clock += 9
        evolution.done, evolution.state = True, State(committed=120)
        recorder.show()
    assert re.match(
        r"candidates: 120/120 \(36.0 s\); .*; 12000 candidates an hour$", screen.getvalue()
    )
