"""What the surrogate says of masks that were not measured."""

import math
import re

import numpy as np
import pytest

from prunevolve.pruning.metric import Criterion
from prunevolve.search.records import Candidate, Outcome, Record
from prunevolve.search.surrogate import Surrogate

BYTES = 8


def sketch_of(criterion):
    """A number n in the text makes n bits of a mask 1: distances are differences of numbers."""
    masks = []
    for ones in re.findall(r"add\(([^,]+),", criterion.metric.text):
        bits = np.zeros(8 * BYTES, np.uint8)
        bits[: int(float(ones))] = 1
        masks.append(np.packbits(bits).view(np.uint64))
    return np.concatenate(masks)


def criterion(*bits):
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


def test_predict_takes_of_a_stopped_one_the_tasks_that_were_measured():
    known = [record(0, (5, 5), 1.0, 1.0), record(1, (55, 55), 9.0, 9.0)]
    halves = (0.5, 0.5)
    stopped, full = (record(2, (30, 30), 3.0, rise) for rise in (None, 3.0))
    promises = [
        predict(surrogate_of(*known, one, weights=halves), 30, 30) for one in (stopped, full)
    ]
    assert promises[0] == promises[1] > predict(surrogate_of(*known, weights=halves), 5, 5)
    unmeasured = record(2, (30, 30), None, None)
    surrogate = surrogate_of(*known, unmeasured, weights=halves)
    assert predict(surrogate, 29, 29) == predict(surrogate_of(*known, weights=halves), 29, 29)


@pytest.mark.parametrize(("weights", "worse"), [((0.9, 0.1), 0), ((0.1, 0.9), 1)])
def test_predict_weighs_tasks_as_the_fitness_does(weights, worse):
    # The first is bad at the first task, the second at the second one.
    known = [record(0, (5, 5), 3.0, 1.0), record(1, (55, 55), 1.0, 3.0)]
    surrogate = surrogate_of(*known, weights=weights)
    promises = predict(surrogate, 6, 6), predict(surrogate, 54, 54)
    assert promises[worse] > promises[1 - worse]


def test_predict_promises_nothing_of_a_mask_like_a_measured_one():
    surrogate = surrogate_of(record(0, 10, 1.0), record(1, 50, 2.0))
    surrogate.alike = 3 / 64
    assert predict(surrogate, 12) == math.inf
    assert predict(surrogate, 13) < predict(surrogate, 47) < math.inf


def test_ask_before_remembers_the_same_however_it_was_learnt(monkeypatch):
    monkeypatch.setattr("prunevolve.search.surrogate._REMEMBERED", 4)
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
