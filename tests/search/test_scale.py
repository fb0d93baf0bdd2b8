"""Cells, their values and what becomes of them, against numbers worked by hand."""

from dataclasses import replace
from math import sqrt

import pytest
from toy_setup import SNIP, WANDA, embedded_setup, made_of, small

from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.parse import named_metric
from prunevolve.search.scale import Cell, Scale, baselines_on, cells_of, unit_of, wanted_of

DENSE = [1.0, 2.0, 3.0, 4.0]
NAMED = {"wanda": [1.2, 2.6, 3.1, 4.1], "snip": [1.4, 2.4, 3.4, 4.8], "magnitude": [9.0] * 4}
FIRST = Cell(
    **{"task": 0, "model": "", "text": "a", "weight": 0.25, "windows": (0, 2), "dense": (1.0, 3.0)},
    **{"baseline": "x", "rise": 0.5, "shares": (0.5, 1.5)},
)
SECOND = replace(FIRST, text="b", windows=(1, 3), weight=0.25)
THIRD = replace(FIRST, task=1, windows=(0, 1), weight=0.5, rise=0.25)


def scale(cells=(FIRST, SECOND, THIRD)):
    return Scale(cells, {})


ONE = scale((replace(FIRST, windows=(0, 1), weight=1.0),))
"""A scale of one cell."""


def rises(losses):
    return [a - b for a, b in zip(losses, DENSE, strict=True)]


def test_unit_is_the_rise_of_the_best_named_metric():
    named = {name: rises(losses) for name, losses in NAMED.items()}
    baseline, unit, shares = unit_of(named)
    assert (baseline, unit) == ("wanda", pytest.approx(0.25))
    wanda, snip = (0.8, 2.4, 0.4, 0.4), (0.8, 0.8, 0.8, 1.6)
    assert shares == pytest.approx([(a + b) / 2 for a, b in zip(wanda, snip, strict=True)])
    baseline, _, shares = unit_of({name: part[1:2] for name, part in named.items()})
    assert (baseline, shares) == ("snip", [1.0])
    # One that gains over dense says nothing of the windows.
    gains = {"wanda": [-0.1, -0.2, 0.0, 0.0], "snip": named["snip"]}
    assert unit_of(gains)[2] == pytest.approx(snip)


def test_unit_is_at_least_what_it_may_be_off():
    gains = [-0.1, -0.2, 0.0, 0.3]
    error = sqrt(sum((rise - sum(gains) / 4) ** 2 for rise in gains) / 3 / 4)
    assert unit_of({"wanda": gains})[1] == pytest.approx(error)
    assert unit_of({"wanda": [0.0] * 4})[1] == 0.001


def test_cell_value_after_some_windows_is_their_rise_over_their_share():
    assert FIRST.value([]) is None
    assert SECOND.value([7.0]) is None
    assert FIRST.value([1.5]) == pytest.approx(0.5 / 0.5 / 0.5)
    assert FIRST.value([1.5, 9.0]) == pytest.approx(0.5 / 0.5 / 0.5)
    assert FIRST.value([1.5, 9.0, 3.1]) == pytest.approx((0.5 + 0.1) / 2 / 0.5)


def test_excess_takes_what_was_not_looked_at_to_be_as_good_as_the_limit():
    values = [FIRST.value([2.0]), 1.0, 1.0]
    assert values[0] == pytest.approx(4.0)
    off = sqrt(0.25**2 + 0.25**2 + 0.5**2)
    expected = 0.25 * 4 + 0.25 + 0.5
    assert scale().excess([[2.0], []], 1.0, (expected - 1) / off - 1e-6) == pytest.approx(expected)
    assert scale().excess([[2.0], []], 1.0, (expected - 1) / off + 1e-6) is None
    assert scale().excess([[1.1], []], 1.0, 0.0) is None


LOSSES, REFERENCE = [[1.5, 3.9], [1.7, 3.3]], [[1.3, 3.3], [1.2, 3.2]]
"""Gaps of 0.2 and 0.6 on the first task, of 0.5 and 0.1 on the second."""


def of_two_tasks(**second):
    """A scale of two tasks of half the weight each, in units of 0.5; the second may differ."""
    cell = replace(FIRST, windows=(0, 1), weight=0.5, model="m")
    return scale((cell, replace(cell, task=1, **second)))


def test_error_of_tasks_on_the_same_windows_is_that_of_their_sum_by_window():
    # By window 0.2 + 0.5 and 0.6 + 0.1 are the same.
    found = of_two_tasks().difference(LOSSES, REFERENCE)
    assert found == (pytest.approx(0.7), pytest.approx(0.0, abs=1e-12))
    # Four times the same task say no more than one: gaps of 0.4 and 1.2 units.
    cell = replace(ONE.cells[0], weight=0.25)
    four = scale([replace(cell, task=task) for task in range(4)])
    found = four.difference(LOSSES[:1] * 4, REFERENCE[:1] * 4)
    assert found == (pytest.approx(0.8), pytest.approx(0.4))
    assert found == pytest.approx(ONE.difference(LOSSES[:1], REFERENCE[:1]))


@pytest.mark.parametrize("other", [{"model": "another"}, {"text": "b", "windows": (1, 0)}])
def test_errors_of_other_models_and_texts_are_independent(other):
    # Half of 0.4 and 1.2 units, and of 1.0 and 0.2: errors of 0.2 each.
    found = of_two_tasks(**other).difference(LOSSES, REFERENCE)
    assert found.standard_error == pytest.approx(sqrt(0.2**2 + 0.2**2))


@pytest.fixture(scope="module")
def evaluator(tiny_llama_dir):
    halves = "fitness={corpus: [embedded, embedded], split: ['fitness[:50%]', 'fitness[50%:]'], "
    texts = f"{halves} share: [3, 1], windows: 4, length: 32}}"
    tasks = "tasks=[{}, {sparsity: 0.9, weight: 3}]"
    return made_of(embedded_setup(*small(1), f"model={tiny_llama_dir}", texts, tasks))


def test_scale_has_a_cell_for_each_task_and_kind_of_text(evaluator, tiny_llama_dir):
    measured = evaluator.scale
    first, second = "embedded fitness[:50%]", "embedded fitness[50%:]"
    assert [(cell.task, cell.text, cell.windows) for cell in measured.cells] == [
        *[(0, first, (0, 1, 3)), (0, second, (2,))],
        *[(1, first, (0, 1, 3)), (1, second, (2,))],
    ]
    assert [cell.weight for cell in measured.cells] == pytest.approx(
        [1 / 4 * 3 / 4, 1 / 4 / 4, 3 / 4 * 3 / 4, 3 / 4 / 4]
    )
    assert {cell.model for cell in measured.cells} == {str(tiny_llama_dir)}
    known = {one: evaluator.losses(*one) for one in wanted_of(evaluator.experiment, "fitness", [1])}
    named = baselines_on(evaluator.experiment, 1, "fitness", known)
    assert list(named) == list(BASELINES)
    assert named["wanda"] == evaluator.losses(1, "fitness", WANDA)
    assert named["snip"] == evaluator.losses(1, "fitness", SNIP)
    known[1, "fitness", WANDA] = None  # it cannot prune
    assert baselines_on(evaluator.experiment, 1, "fitness", known) == {
        k: v for k, v in named.items() if k != "wanda"
    }
    known |= {(1, "fitness", named_metric(name)): None for name in BASELINES}
    with pytest.raises(ValueError, match=r"^no baseline can prune task 1: "):
        cells_of(evaluator.experiment, 1, "fitness", known)
