"""What the surrogate says of masks that were not measured."""

import math

import numpy as np
import pytest

from pruning.criterion import Criterion
from search.population import Candidate, Outcome, Record
from search.surrogate import Surrogate

BYTES = 8


def sketch_of(criterion: Criterion) -> np.ndarray:
    """A number n in the text makes n bits of the mask 1: distances are differences of numbers."""
    bits = np.zeros(8 * BYTES, np.uint8)
    bits[: int(float(criterion.metric.text.split("(")[1].split(",")[0]))] = 1
    return np.packbits(bits)


def criterion(bits: int) -> Criterion:
    return Criterion.parse(f"add({bits}, W)", "row")


def record(index: int, bits: int, fitness: float | None, estimate: float | None = None) -> Record:
    kind = "stopped" if fitness is None else "evaluated"
    candidate = Candidate(index, criterion(bits))
    return Record(candidate, Outcome(kind, fitness, 1, "", estimate))


def surrogate_of(*records: Record, before: int = 100) -> Surrogate:
    surrogate = Surrogate(sketch_of)
    for one in records:
        surrogate.learn(one)
    surrogate.ask_before(before)
    return surrogate


def test_nothing_measured_promises_the_same_of_all():
    assert surrogate_of().predict(criterion(1)) == surrogate_of().predict(criterion(40)) == 0


def test_a_mask_near_good_ones_promises_more_than_one_near_bad_ones():
    good = [record(i, 10 + i, 1.0 + i / 100) for i in range(5)]
    bad = [record(10 + i, 50 + i, 9.0) for i in range(5)]
    surrogate = surrogate_of(*good, *bad)
    assert surrogate.predict(criterion(15)) < surrogate.predict(criterion(49)) - 0.1


def test_a_stopped_one_counts_by_its_estimate_and_one_without_is_not_asked():
    records = [record(0, 5, 1.0), record(1, 55, None, 9.0)]
    surrogate = surrogate_of(*records)
    assert surrogate.predict(criterion(54)) > surrogate.predict(criterion(6))
    unknown = Record(Candidate(2, criterion(54)), Outcome("degenerate"))
    assert surrogate_of(*records, unknown).predict(criterion(54)) == surrogate.predict(
        criterion(54)
    )


def test_of_masks_between_the_same_ranks_the_unknown_one_promises_more():
    surrogate = surrogate_of(record(0, 0, 2.0), record(1, 2, 2.0), record(2, 40, 2.0))
    known, unknown = surrogate.predict(criterion(1)), surrogate.predict(criterion(21))
    assert unknown < known


def test_a_mask_like_a_measured_one_promises_nothing():
    surrogate = surrogate_of(record(0, 10, 1.0), record(1, 50, 2.0))
    surrogate.alike = 3 / 64
    assert surrogate.predict(criterion(12)) == math.inf
    assert surrogate.predict(criterion(13)) < surrogate.predict(criterion(47)) < math.inf


def test_only_records_before_the_given_index_are_asked():
    records = [record(0, 5, 1.0), record(1, 55, 9.0), record(2, 30, 0.5)]
    early = surrogate_of(*records, before=2)
    assert early.predict(criterion(30)) == surrogate_of(*records[:2]).predict(criterion(30))
    early.ask_before(3)
    assert early.predict(criterion(30)) == surrogate_of(*records).predict(criterion(30))


def test_the_latest_are_remembered_and_the_first_forgotten(monkeypatch):
    monkeypatch.setattr("search.surrogate._REMEMBERED", 2)
    records = [record(0, 5, 1.0), record(1, 55, 9.0), record(2, 30, 0.5)]
    surrogate = surrogate_of(*records)
    assert surrogate.predict(criterion(5)) == surrogate_of(*records[1:]).predict(criterion(5))


def test_what_is_remembered_is_the_same_however_it_was_learnt(monkeypatch):
    monkeypatch.setattr("search.surrogate._REMEMBERED", 4)
    records = [record(i, (7 * i) % 60, float((5 * i) % 11)) for i in range(20)]
    step_by_step = Surrogate(sketch_of)
    for one in records:
        step_by_step.ask_before(max(0, one.index - 3))
        step_by_step.learn(one)
    step_by_step.ask_before(17)
    at_once = surrogate_of(*records, before=17)
    for bits in range(0, 60, 7):
        expected = pytest.approx(at_once.predict(criterion(bits)), abs=0)
        assert step_by_step.predict(criterion(bits)) == expected
