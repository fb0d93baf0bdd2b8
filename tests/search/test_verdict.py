"""The verdict on a run: one sentence that its numbers bear out."""

import pytest

from search.verdict import verdict_of


def task(best, named, gap, error, overlap=0.9):
    """Return a task whose best named metric is wanda."""
    return {
        "baselines": {"snip": named + 10, "wanda": named},
        "best": {"perplexity": best},
        "behind_best": {
            "snip": {"nats": gap + 1, "standard_error": error},
            "wanda": {"nats": gap, "standard_error": error},
        },
        "by_text": [{"relative_rise": best / named}],
        "overlap": {"snip": {"a": 0.5, "b": 1.0}, "wanda": {"a": 1.0, "b": overlap}},
    }


@pytest.mark.parametrize(
    ("gap", "best", "expected"),
    [
        (
            0.3,
            30.0,
            "the best found beats the best named metric, wanda, by 25.0% of perplexity "
            "(30.00 against 40.00, 3.0 standard errors)",
        ),
        (
            0.1,
            39.0,
            "the best found does not clearly beat the best named metric, wanda: its perplexity is "
            "2.5% better, which may be chance (39.00 against 40.00, 1.0 standard errors)",
        ),
        (
            -0.1,
            41.0,
            "the best found does not clearly beat the best named metric, wanda: its perplexity is "
            "2.5% worse, which may be chance (41.00 against 40.00, 1.0 standard errors)",
        ),
        (
            -0.4,
            50.0,
            "the best found does not beat the best named metric, wanda: its perplexity is 25.0% "
            "worse (50.00 against 40.00, 4.0 standard errors)",
        ),
    ],
)
def test_verdict_says_by_how_much_and_how_many_standard_errors(gap, best, expected):
    assert verdict_of({"tasks": [task(best, 40.0, gap, 0.1)]}) == expected


def test_verdict_without_a_standard_error_gives_none():
    assert verdict_of({"tasks": [task(30.0, 40.0, 0.3, None)]}) == (
        "the best found is 25.0% below the best named metric, wanda, in perplexity "
        "(30.00 against 40.00)"
    )


def test_a_named_metric_under_another_spelling_is_called_by_its_name():
    same = task(40.0, 40.0, 0.0, 0.0, overlap=1.0)
    expected = "the best found is wanda under another spelling: it prunes the same weights"
    assert verdict_of({"tasks": [same, same]}) == expected
    # The same weights in one task alone are not the same metric.
    other = task(30.0, 40.0, 0.3, 0.1)
    assert "spelling" not in verdict_of({"tasks": [same, other]})


def test_another_spelling_of_what_is_not_the_best_named_says_so():
    snip = task(50.0, 40.0, -0.3, 0.1)
    snip["overlap"]["snip"] = {"a": 1.0, "b": 1.0}
    assert verdict_of({"tasks": [snip]}).endswith("the same weights, and wanda is better")


def test_verdict_on_several_tasks_is_about_their_rises():
    tasks = [task(30.0, 40.0, 0.3, 0.1), task(38.0, 40.0, 0.1, 0.1)]
    assert verdict_of({"tasks": tasks}) == (
        "the best found beats the best named metrics: its rise over dense is 0.850 of theirs, the "
        "mean over 2 tasks and kinds of text, and it is 2 standard errors or more ahead in 1 of 2 "
        "tasks"
    )
