"""The verdict on a run: better, level, worse, unknown, or a named metric in disguise."""

import pytest

from search.verdict import verdict_of


def task_of(perplexity, gaps, baselines=None, **more):
    """One task's measurements; gaps are (nats, standard error) by name."""
    return {
        "baselines": baselines or {"wanda": 40.0, "snip": 50.0},
        "behind_best": {
            name: {"nats": nats, "standard_error": error} for name, (nats, error) in gaps.items()
        },
        "best": {"perplexity": perplexity},
        **more,
    }


def run_of(*tasks, metric="mul(W, add(G, X))"):
    """A summary; its first task also stands at its top, as in the file."""
    first = tasks[0]
    best = {"metric": metric, "group": "row", **first["best"]}
    return {**first, "best": best, "tasks": list(tasks) if len(tasks) > 1 else []}


def test_better_by_two_standard_errors_beats_the_best_named_metric():
    found = verdict_of(run_of(task_of(36.0, {"wanda": (0.1, 0.05), "snip": (0.3, 0.01)})))
    assert found.kind == "better"
    assert found.sentence == (
        "Beats wanda, the best named metric on the report text: perplexity 36.00 against 40.00, "
        "10.0% lower, 2.0 standard errors apart."
    )


def test_less_than_two_standard_errors_is_level_to_either_side():
    for nats in (0.09, -0.09):
        found = verdict_of(run_of(task_of(38.0, {"wanda": (nats, 0.05)}, {"wanda": 40.0})))
        assert found.kind == "level"
        assert found.sentence == (
            "Does not clearly beat wanda, the best named metric on the report text, nor lose to "
            "it: perplexity 38.00 against 40.00, 1.8 standard errors apart."
        )


def test_worse_than_the_best_named_metric_though_better_than_another():
    found = verdict_of(run_of(task_of(44.0, {"wanda": (-0.1, 0.01), "snip": (0.2, 0.01)})))
    assert found.kind == "worse"
    assert found.sentence == (
        "Does not beat wanda, the best named metric on the report text: perplexity 44.00 against "
        "40.00, 10.0% higher, 10.0 standard errors apart."
    )


def test_a_single_window_has_no_error_and_no_verdict():
    found = verdict_of(run_of(task_of(36.0, {"wanda": (0.1, None)}, {"wanda": 40.0})))
    assert found.kind == "unknown"
    assert found.sentence.endswith("on a single window, so the error is unknown.")


def test_without_named_metrics_there_is_nothing_to_compare_with():
    summary = run_of(task_of(36.0, {}, {"wanda": 1.0}))
    summary["baselines"] = {}
    assert verdict_of(summary).kind == "unknown"


def test_the_best_named_metric_in_disguise_is_said_to_be_it():
    overlap = {"snip": {"a": 1.0, "b": 1.0}, "wanda": {"a": 1.0, "b": 0.99}}
    gaps = {"snip": (0.0, 0.0), "wanda": (0.1, 0.01)}
    task = task_of(30.0, gaps, {"snip": 30.0, "wanda": 33.0}, overlap=overlap)
    found = verdict_of(run_of(task))
    assert found.kind == "level"
    assert found.sentence == (
        "Is snip, the best named metric on the report text, under another spelling: every mask is "
        "the same."
    )


def test_a_worse_named_metric_in_disguise_is_also_compared_with_the_best():
    gaps = {"snip": (0.0, 0.0), "wanda": (-0.1, 0.01)}
    found = verdict_of(run_of(task_of(44.0, gaps, {"snip": 44.0, "wanda": 40.0})))
    assert found.kind == "worse"
    assert found.sentence.startswith("Is snip under another spelling: every mask is the same. Does")


def test_a_named_metric_as_it_is_written_is_itself():
    task = task_of(30.0, {"snip": (0.0, 0.0)}, {"snip": 30.0})
    found = verdict_of(run_of(task, metric="mul(W, G)"))
    assert found.sentence == "Is snip itself, the best named metric on the report text."


def test_masks_that_differ_are_no_disguise_whatever_the_losses():
    gaps = {"snip": (0.0, 0.0)}
    task = task_of(30.0, gaps, {"snip": 30.0}, overlap={"snip": {"a": 1.0, "b": 0.999}})
    assert "spelling" not in verdict_of(run_of(task)).sentence


BETTER = task_of(36.0, {"wanda": (0.1, 0.02)}, {"wanda": 40.0}, name="a")
BETTER_BY_MORE = task_of(30.0, {"wanda": (0.3, 0.03)}, {"wanda": 40.0}, name="b")
LEVEL = task_of(39.9, {"wanda": (0.002, 0.02)}, {"wanda": 40.0}, name="c")
WORSE = task_of(50.0, {"wanda": (-0.2, 0.02)}, {"wanda": 40.0}, name="d")


def test_better_on_every_task_is_one_sentence_with_the_least_and_the_most():
    found = verdict_of(run_of(BETTER, BETTER_BY_MORE))
    assert found.kind == "better"
    assert found.sentence == (
        "Beats the best named metric on the report text of each of the 2 tasks: perplexity 10.0% "
        "to 25.0% lower, 5.0 to 10.0 standard errors apart."
    )


@pytest.mark.parametrize(
    ("tasks", "kind"),
    [((BETTER, LEVEL), "level"), ((BETTER, LEVEL, WORSE), "worse"), ((LEVEL, LEVEL), "level")],
)
def test_tasks_that_differ_are_as_good_as_the_worst(tasks, kind):
    assert verdict_of(run_of(*tasks)).kind == kind


def test_tasks_that_differ_are_named():
    assert verdict_of(run_of(BETTER, LEVEL, WORSE)).sentence == (
        "Compared with the best named metric on the report text: better on 1 of 3 tasks (a), "
        "level on 1 of 3 tasks (c), worse on 1 of 3 tasks (d)."
    )
