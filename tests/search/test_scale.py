"""Cells, their values and what becomes of them, against numbers worked by hand."""

from math import sqrt

import pytest
from toy_setup import SNIP, WANDA, asking, embedded_setup, made_of, small

from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.parse import named_metric
from prunevolve.search.scale import Cell, Scale, cell_of, cells_of, losses_of, paired_difference

DENSE = [1.0, 2.0, 3.0, 4.0]
NAMED = {"wanda": [1.2, 2.6, 3.1, 4.1], "snip": [1.4, 2.4, 3.4, 4.8], "magnitude": [9.0] * 4}
FIRST = Cell(
    **{"task": 0, "text": "a", "weight": 0.25, "windows": (0, 2), "dense": (1.0, 3.0)},
    **{"baseline": "x", "rise": 0.5, "shares": (0.5, 1.5)},
)
SECOND = FIRST.model_copy(update={"text": "b", "windows": (1, 3), "weight": 0.25})
THIRD = FIRST.model_copy(update={"task": 1, "windows": (0, 1), "weight": 0.5, "rise": 0.25})


def scale(cells=(FIRST, SECOND, THIRD)):
    return Scale(cells=cells)


ONE = scale((FIRST.model_copy(update={"windows": (0, 1), "weight": 1.0}),))
"""A scale of one cell."""


def test_cell_is_measured_in_the_rise_of_the_best_named_metric():
    cell = cell_of(0, "text", 1.0, range(4), DENSE, NAMED)
    assert (cell.baseline, cell.rise) == ("wanda", pytest.approx(0.25))
    wanda, snip = (0.8, 2.4, 0.4, 0.4), (0.8, 0.8, 0.8, 1.6)
    assert cell.shares == pytest.approx([(a + b) / 2 for a, b in zip(wanda, snip, strict=True)])
    assert cell.value(NAMED["wanda"]) == pytest.approx(1.0)
    assert cell.value(NAMED["snip"]) == pytest.approx(2.0)
    assert cell.value(DENSE) == 0
    one_window = cell_of(0, "text", 1.0, [1], DENSE, NAMED)
    assert (one_window.baseline, one_window.shares) == ("snip", (1.0,))
    # One that gains over dense says nothing of the windows.
    gains = {"wanda": [0.9, 1.8, 3.0, 4.0], "snip": NAMED["snip"]}
    assert cell_of(0, "text", 1.0, range(4), DENSE, gains).shares == pytest.approx(snip)


def test_cell_value_after_some_windows_is_their_rise_over_their_share():
    assert FIRST.value([]) is None
    assert SECOND.value([7.0]) is None
    assert FIRST.value([1.5]) == pytest.approx(0.5 / 0.5 / 0.5)
    assert FIRST.value([1.5, 9.0]) == pytest.approx(0.5 / 0.5 / 0.5)
    assert FIRST.value([1.5, 9.0, 3.1]) == pytest.approx((0.5 + 0.1) / 2 / 0.5)


def test_cell_rise_is_at_least_what_it_may_be_off():
    gains = {"wanda": [0.9, 1.8, 3.0, 4.3]}
    rises = [-0.1, -0.2, 0.0, 0.3]
    error = sqrt(sum((rise - sum(rises) / 4) ** 2 for rise in rises) / 3 / 4)
    assert cell_of(0, "text", 1.0, range(4), DENSE, gains).rise == pytest.approx(error)
    assert cell_of(0, "text", 1.0, range(4), DENSE, {"wanda": DENSE}).rise == 0.001


def test_cell_without_a_named_metric_is_refused():
    with pytest.raises(ValueError, match=r"^no baseline can prune task 3: "):
        cell_of(3, "text", 1.0, range(4), DENSE, {})


def test_fitness_is_the_mean_of_the_cells_by_weight():
    assert ONE.fitness([[1.5, 3.7]]) == pytest.approx((0.5 + 0.7) / 2 / 0.5)
    assert scale().fitness([[1.5, 1.5, 3.5, 3.5], [1.25, 3.25]]) == pytest.approx(1.0)
    # What was not evaluated is taken for as good as the rest.
    assert scale().fitness([[1.5], []]) == FIRST.value([1.5])


def test_rises_by_task_are_those_of_the_kinds_of_text_seen_so_far():
    cells = (FIRST, SECOND.model_copy(update={"weight": 0.75}), THIRD)
    losses = [1.5, 9.0, 3.1, 5.0]
    first, second = FIRST.value(losses), SECOND.value(losses)
    both = scale(cells=cells).rises_by_task([losses, []])
    assert both == (pytest.approx(0.25 * first + 0.75 * second), None)
    assert scale(cells=cells).rises_by_task([[1.5], [1.25]]) == (
        pytest.approx(FIRST.value([1.5])),
        pytest.approx(THIRD.value([1.25])),
    )


def test_excess_takes_what_was_not_looked_at_to_be_as_good_as_the_limit():
    values = [FIRST.value([2.0]), 1.0, 1.0]
    assert values[0] == pytest.approx(4.0)
    off = sqrt(0.25**2 + 0.25**2 + 0.5**2)
    expected = 0.25 * 4 + 0.25 + 0.5
    assert scale().excess([[2.0], []], 1.0, (expected - 1) / off - 1e-6) == pytest.approx(expected)
    assert scale().excess([[2.0], []], 1.0, (expected - 1) / off + 1e-6) is None
    assert scale().excess([[1.1], []], 1.0, 0.0) is None


def test_difference_is_that_of_the_fitnesses_with_the_error_of_its_windows():
    losses, reference = [[1.5, 1.5, 3.5, 3.5], [1.3, 3.6]], [[1.2, 1.9, 3.2, 3.2], [1.2, 3.1]]
    found = scale().difference(losses, reference)
    assert found.mean == pytest.approx(scale().fitness(losses) - scale().fitness(reference))
    assert found.standard_error > 0
    assert scale().difference(losses, losses).standard_error == pytest.approx(0)
    paired = paired_difference(losses[1], reference[1])
    one = ONE.difference(losses[1:], reference[1:])
    assert one == pytest.approx([value / 0.5 for value in paired])


LOSSES, REFERENCE = [[1.5, 3.9], [1.7, 3.3]], [[1.3, 3.3], [1.2, 3.2]]
"""Gaps of 0.2 and 0.6 on the first task, of 0.5 and 0.1 on the second."""


def of_two_tasks(**second):
    """A scale of two tasks of half the weight each, in units of 0.5; the second may differ."""
    cell = FIRST.model_copy(update={"windows": (0, 1), "weight": 0.5, "model": "m"})
    return scale((cell, cell.model_copy(update={"task": 1, **second})))


def test_error_of_tasks_on_the_same_windows_is_that_of_their_sum_by_window():
    # By window 0.2 + 0.5 and 0.6 + 0.1 are the same.
    found = of_two_tasks().difference(LOSSES, REFERENCE)
    assert found == (pytest.approx(0.7), pytest.approx(0.0, abs=1e-12))
    # Four times the same task say no more than one: gaps of 0.4 and 1.2 units.
    cell = ONE.cells[0].model_copy(update={"weight": 0.25})
    four = scale([cell.model_copy(update={"task": task}) for task in range(4)])
    found = four.difference(LOSSES[:1] * 4, REFERENCE[:1] * 4)
    assert found == (pytest.approx(0.8), pytest.approx(0.4))
    assert found == pytest.approx(ONE.difference(LOSSES[:1], REFERENCE[:1]))


@pytest.mark.parametrize("other", [{"model": "another"}, {"text": "b", "windows": (1, 0)}])
def test_errors_of_other_models_and_texts_are_independent(other):
    # Half of 0.4 and 1.2 units, and of 1.0 and 0.2: errors of 0.2 each.
    found = of_two_tasks(**other).difference(LOSSES, REFERENCE)
    assert found.standard_error == pytest.approx(sqrt(0.2**2 + 0.2**2))


@pytest.fixture(scope="module")
def evaluator():
    halves = "fitness={corpus: [embedded, embedded], split: ['fitness[:50%]', 'fitness[50%:]'], "
    texts = f"{halves} share: [3, 1], windows: 4, length: 32}}"
    return made_of(embedded_setup(*small(4), texts, "tasks=[{}, {sparsity: 0.9, weight: 3}]"))


def test_scale_has_a_cell_for_each_task_and_kind_of_text(evaluator):
    measured = evaluator.scale
    first, second = "embedded fitness[:50%]", "embedded fitness[50%:]"
    assert [(cell.task, cell.text, cell.windows) for cell in measured.cells] == [
        *[(0, first, (0, 1, 3)), (0, second, (2,))],
        *[(1, first, (0, 1, 3)), (1, second, (2,))],
    ]
    assert [cell.weight for cell in measured.cells] == pytest.approx(
        [1 / 4 * 3 / 4, 1 / 4 / 4, 3 / 4 * 3 / 4, 3 / 4 / 4]
    )
    assert {cell.model for cell in measured.cells} == {"embedded"}
    dense, named = losses_of(asking(evaluator), 1, "fitness")
    assert list(named) == list(BASELINES)
    assert named["wanda"] == evaluator.losses(1, "fitness", WANDA)
    assert named["snip"] == evaluator.losses(1, "fitness", SNIP)
    assert list(measured.cells[2:]) == cells_of(evaluator.experiment, 1, "fitness", dense, named)


def test_losses_leave_out_a_baseline_that_cannot_prune():
    def measure(asked):
        assert asked[1] == (0, "fitness", named_metric("magnitude"))
        return [DENSE, None, *([[2.0] * 4] * (len(asked) - 2))]

    dense, named = losses_of(measure, 0, "fitness")
    assert dense == DENSE
    assert list(named) == list(BASELINES)[1:]
