"""The verdict on a run: better, level, worse, unknown, and with what it was compared."""

import pytest
from report_run import task_of

from prunevolve.search.verdict import convergence, looks_at_report, verdict_of


def measured(perplexity, gaps, baselines=None, **changes):
    """One task's measurements; gaps are (nats, standard error) by name."""
    fields = task_of(
        baselines=baselines or {"wanda": 40.0, "snip": 50.0},
        behind_best={
            name: {"nats": n, "standard_error": error} for name, (n, error) in gaps.items()
        },
        best={"perplexity": perplexity},
    )
    return {**fields, **changes}


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
            "candidate 4, of 0 to 5; the last third lowered the fitness by 0.1000",
        ),
        ([1.0, 0.7, 0.8], "candidate 1, of 0 to 2; the last third lowered the fitness by 0.0000"),
        ([None, None, 0.9], "candidate 2, of 0 to 2"),
    ],
)
def test_convergence_names_the_last_improvement_and_what_the_last_third_brought(fitness, line):
    assert convergence(fitness) == f"last improvement at {line}"
    assert convergence([None]) == "no candidate was evaluated yet"


def test_later_looks_at_the_report_text_are_counted():
    looks = [{"candidates": 60, "perplexity": 30.57}, {"candidates": 100, "perplexity": 30.1}]
    assert looks_at_report([]) == ""
    assert looks_at_report(looks) == (
        " Look 3 at this text: after 60 candidates it had 30.57, after 100 candidates it had 30.10."
    )
