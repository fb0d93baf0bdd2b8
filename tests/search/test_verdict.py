"""The verdict on a run: better, level, worse, unknown, and with what it was compared."""

import pytest
from report_run import task_of

from prunevolve.search.verdict import verdict_of


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


LEVEL_SENTENCE = (
    "Does not clearly beat wanda, the best of the 2 baselines on the report text, nor lose to it: "
    "perplexity 38.00 against 40.00, 1.8 standard errors apart."
)


@pytest.mark.parametrize(
    ("perplexity", "nats", "error", "kind", "sentence"),
    [
        (
            *(36.0, 0.1, 0.05, "better"),
            "Beats wanda, the best of the 2 baselines on the report text: perplexity 36.00 against "
            "40.00, 10.0% lower, 2.0 standard errors apart.",
        ),
        (38.0, 0.09, 0.05, "level", LEVEL_SENTENCE),
        (38.0, -0.09, 0.05, "level", LEVEL_SENTENCE),
        (
            *(44.0, -0.1, 0.01, "worse"),
            "Does not beat wanda, the best of the 2 baselines on the report text: perplexity 44.00 "
            "against 40.00, 10.0% higher, 10.0 standard errors apart.",
        ),
    ],
)
def test_verdict_goes_by_two_standard_errors_to_the_best_baseline(
    perplexity, nats, error, kind, sentence
):
    found = verdict_of([measured(perplexity, {"wanda": (nats, error), "snip": (0.3, 0.01)})])
    assert (found.kind, found.sentence) == (kind, sentence)


def test_verdict_is_unknown_on_a_single_window_or_without_baselines():
    found = verdict_of([measured(36.0, {"wanda": (0.1, None)}, {"wanda": 40.0})])
    assert found.kind == "unknown"
    assert "wanda, the only baseline on the report text: perplexity 36.00 against 40.00" in (
        found.sentence
    )
    assert verdict_of([measured(36.0, {}) | {"baselines": {}}]).kind == "unknown"


def test_verdict_says_if_the_best_baseline_was_found_again():
    found = verdict_of([measured(40.0, {"wanda": (0.0, 0.0), "snip": (0.2, 0.01)})])
    assert found.kind == "level"
    assert found.sentence.startswith("Equals wanda, the best of the 2 baselines")


BETTER = measured(36.0, {"wanda": (0.1, 0.02)}, name="a")
LEVEL = measured(39.9, {"wanda": (0.002, 0.02)}, name="c")
WORSE = measured(50.0, {"wanda": (-0.2, 0.02)}, name="d")


def test_verdict_on_tasks_with_other_numbers_of_baselines_says_so():
    found = verdict_of([BETTER, measured(30.0, {"wanda": (0.3, 0.03)}, {"wanda": 40.0}, name="b")])
    assert found == (
        "better",
        "Compared with the best of the 1 to 2 baselines on the report text: better on 2 of 2 tasks "
        "(a, b).",
    )


def test_verdict_on_tasks_that_differ_is_that_of_the_worst_and_names_them():
    assert verdict_of([LEVEL, LEVEL]).kind == verdict_of([BETTER, LEVEL]).kind == "level"
    found = verdict_of([BETTER, LEVEL, WORSE])
    assert found.kind == "worse"
    assert found.sentence == (
        "Compared with the best of the 2 baselines on the report text: better on 1 of 3 tasks (a), "
        "level on 1 of 3 tasks (c), worse on 1 of 3 tasks (d)."
    )
