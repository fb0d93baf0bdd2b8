"""Commands, tables and verdict of a report; its page is in tests/test_run_search.py."""

import shlex

import pytest
from toy_records import record_of

from prunevolve.configs import schema
from prunevolve.search.progress import convergence
from prunevolve.search.report import front_table
from prunevolve.search.results import commands_of, verdict_of
from prunevolve.search.run_folder import RunFolder


@pytest.mark.parametrize(("bos", "flag"), [(True, "--bos"), (False, "--no-bos"), (None, None)])
def test_command_of_the_next_step_has_the_runs_bos_and_windows(tmp_path, bos, flag):
    own = [f"calibration.bos={str(bos).lower()}"] if flag else []
    config = schema.load(None, ["report.windows=5", *own])
    words = shlex.split(commands_of(RunFolder(tmp_path), config)[0])
    assert [word for word in words if "bos" in word] == ([flag] if flag else [])
    assert f"{tmp_path}/best_metric.json" in words
    assert words[words.index("--eval-windows") + 1] == "5"


def test_front_has_the_baselines_that_no_smaller_metric_is_as_fit_as():
    found = [record_of(0, "mul(W, G)", 0.9), record_of(1, "mul(W, add(G, sqr(W)))", 0.5)]
    rows = [{"name": str(one.index), **one.described} for one in found]
    chosen = {"name": "7-1", **record_of(7, "mul(G, sqrt(X))", 0.95).described}
    named = {"magnitude": 3.0, "wanda": 0.8, "snip": 2.0}
    table = front_table([*rows, chosen], named, "7-1")
    # What was chosen need not be on the front.
    assert [row[:3] for row in table.rows] == [
        *(("magnitude", "1", "3.0000"), ("0", "3", "0.9000"), ("wanda", "4", "0.8000")),
        *(("7-1, chosen", "4", "0.9500"), ("1", "6", "0.5000")),
    ]


def measured(perplexity, gaps, name=""):
    """One task's measurements; gaps are (nats, standard error) by name."""
    behind = {name: {"nats": n, "standard_error": error} for name, (n, error) in gaps.items()}
    best, baselines = {"perplexity": perplexity}, {"wanda": 40.0, "snip": 50.0}
    return {"name": name, "best": best, "baselines": baselines, "behind_best": behind}


@pytest.mark.parametrize(
    ("nats", "error", "kind"),
    [
        *((0.1, 0.05, "better"), (0.09, 0.05, "level"), (-0.09, 0.05, "level")),
        *((-0.1, 0.05, "worse"), (0.0, 0.0, "level"), (0.1, None, "unknown")),
    ],
)
def test_verdict_goes_by_two_standard_errors_to_the_best_baseline(nats, error, kind):
    found = verdict_of([measured(36.0, {"wanda": (nats, error), "snip": (0.3, 0.01)})])
    assert found.kind == kind
    against = (
        "wanda, the best of the 2 baselines on the report text: perplexity 36.00 against 40.00"
    )
    assert against in found.sentence.replace(", nor lose to it", "")


BETTER = measured(36.0, {"wanda": (0.1, 0.02)}, name="a")
LEVEL = measured(39.9, {"wanda": (0.002, 0.02)}, name="c")
WORSE = measured(50.0, {"wanda": (-0.2, 0.02)}, name="d")


def test_verdict_on_tasks_that_differ_is_that_of_the_worst_and_names_them():
    assert verdict_of([LEVEL, LEVEL]).kind == verdict_of([BETTER, LEVEL]).kind == "level"
    found = verdict_of([BETTER, LEVEL, WORSE])
    assert found.kind == "worse"
    assert found.sentence == (
        "Compared with the best of the 2 baselines on the report text: better on 1 of 3 tasks (a), "
        "level on 1 of 3 tasks (c), worse on 1 of 3 tasks (d)."
    )


@pytest.mark.parametrize(
    ("fitness", "line"),
    [
        (
            [1.0, 0.9, None, 0.95, 0.8, 0.9],
            "candidate 4 of 6, 0.1000 lower in the last third",
        ),
        ([1.0, 0.7, 0.8], "candidate 1 of 3, none in the last third"),
        ([None, None, 0.9], "candidate 2 of 3"),
    ],
)
def test_convergence_names_the_last_improvement_and_what_the_last_third_brought(fitness, line):
    assert convergence(fitness) == f"last improvement: {line}"
    assert convergence([None]) == "no candidate was evaluated yet"
