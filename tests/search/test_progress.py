"""What a run says of its status, in lines and for trackers; see also test_run_search."""

from report_run import STATUS

from prunevolve.search.progress import lines_of, values_of


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
