"""What the surrogate says of masks that were not measured."""

import math
import re

import numpy as np
import pytest

from pruning.criterion import Criterion
from search.population import Candidate, Outcome, Record
from search.surrogate import Surrogate

BYTES = 8


def sketch_of(criterion):
    """A number n in the text makes n bits of a mask 1: distances are differences of numbers."""
    masks = []
    for ones in re.findall(r"add\(([^,]+),", criterion.metric.text):
        bits = np.zeros(8 * BYTES, np.uint8)
        bits[: int(float(ones))] = 1
        masks.append(np.packbits(bits).view(np.uint64))
    return tuple(masks)


def criterion(*bits):
    """A criterion with so many ones in its mask for each task."""
    return Criterion.parse("".join(f"add({ones}, " for ones in bits) + "W" + ")" * len(bits), "row")


def record(index, bits, *rises):
    """A record of a candidate that was stopped, if a task was not measured."""
    kind = "stopped" if None in rises else "evaluated"
    ones = bits if isinstance(bits, tuple) else (bits,)
    fitness = None if kind == "stopped" else 1.0
    return Record(Candidate(index, criterion(*ones)), Outcome(kind, fitness, 1, rises=rises))


def surrogate_of(*records, before=100, weights=(1.0,)):
    surrogate = Surrogate(sketch_of, weights)
    for one in records:
        surrogate.learn(one)
    surrogate.ask_before(before)
    return surrogate


def predict(surrogate, *bits):
    """What one mask, with so many ones for each task, promises."""
    (promise,) = surrogate.predict([criterion(*bits)])
    return promise


def test_predict_is_0_while_nothing_was_measured_and_learns_nothing_of_what_was_not():
    assert predict(surrogate_of(), 1) == predict(surrogate_of(), 40) == 0
    records = [record(0, 5, 1.0), record(1, 55, 9.0)]
    unknown = Record(Candidate(2, criterion(54)), Outcome("degenerate"))
    assert predict(surrogate_of(*records, unknown), 54) == predict(surrogate_of(*records), 54)


def test_predict_promises_more_near_good_masks_than_near_bad_ones():
    good = [record(i, 10 + i, 1.0 + i / 100) for i in range(5)]
    bad = [record(10 + i, 50 + i, 9.0) for i in range(5)]
    surrogate = surrogate_of(*good, *bad)
    assert predict(surrogate, 15) < predict(surrogate, 49) - 0.1
    # The good are told apart beside what is hopeless.
    surrogate = surrogate_of(record(0, 5, 0.9), record(1, 30, 1.1), record(2, 60, 1e6))
    assert predict(surrogate, 6) < predict(surrogate, 29) - 0.01


def test_learn_takes_of_one_that_a_task_has_stopped_that_task_alone():
    halves = (0.5, 0.5)
    both = [record(0, (5, 5), 1.0, 1.0), record(1, (55, 55), 9.0, 9.0)]
    surrogate = surrogate_of(*both, record(2, (30, 30), 9.0, None), weights=halves)
    without = surrogate_of(*both, weights=halves)
    # A mask that is bad for the first task promises as much as before for the second alone.
    assert predict(surrogate, 30, 5) > predict(without, 30, 5)
    assert predict(surrogate, 5, 30) == pytest.approx(predict(without, 5, 30), abs=0.01)


def test_predict_hears_nothing_of_a_task_on_which_nothing_was_measured():
    surrogate = surrogate_of(
        record(0, (5, 5), 1.0, None), record(1, (55, 55), 9.0, None), weights=(0.5, 0.5)
    )
    assert predict(surrogate, 6, 54) < predict(surrogate, 54, 6)
    assert predict(surrogate, 6, 54) == predict(surrogate, 6, 20)


@pytest.mark.parametrize(("weights", "better"), [((0.5, 0.5), (10, 30)), ((0.1, 0.9), (20, 20))])
def test_predict_weighs_tasks_as_the_fitness_does(weights, better):
    one = [record(i, (10 + 10 * i,) * 2, *(0.8 + 0.2 * i,) * 2) for i in range(3)]
    surrogate = surrogate_of(*one, weights=weights)
    other = (10, 30) if better == (20, 20) else (20, 20)
    assert predict(surrogate, *better) < predict(surrogate, *other)


def test_predict_promises_nothing_of_a_mask_like_a_measured_one():
    surrogate = surrogate_of(record(0, 10, 1.0), record(1, 50, 2.0))
    surrogate.alike = 3 / 64
    assert predict(surrogate, 12) == math.inf
    assert predict(surrogate, 13) < predict(surrogate, 47) < math.inf


def test_ask_before_may_forget_all_measurements_of_a_task(monkeypatch):
    monkeypatch.setattr("search.surrogate._REMEMBERED", 2)
    records = [record(0, (5, 5), 1.0, 1.0), *(record(i, (9 * i, 9), 2.0, None) for i in (1, 2, 3))]
    surrogate = Surrogate(sketch_of, (0.5, 0.5))
    for one in records:
        surrogate.learn(one)
        surrogate.ask_before(one.index + 1)
    assert predict(surrogate, 20, 5) == predict(surrogate, 20, 50)


def test_ask_before_remembers_the_same_however_it_was_learnt(monkeypatch):
    monkeypatch.setattr("search.surrogate._REMEMBERED", 4)
    records = [record(i, (7 * i) % 60, float((5 * i) % 11)) for i in range(20)]
    step_by_step = Surrogate(sketch_of)
    for one in records:
        step_by_step.ask_before(max(0, one.index - 3))
        step_by_step.learn(one)
    step_by_step.ask_before(17)
    at_once = surrogate_of(*records, before=17)
    for bits in range(0, 60, 7):
        expected = pytest.approx(predict(at_once, bits), abs=0)
        assert predict(step_by_step, bits) == expected
