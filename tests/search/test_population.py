"""States: who survives, is remembered and chosen, what stops a candidate; records as lines."""

import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
from refusals import refusal
from toy_records import record_of

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.search.evolution import LEEWAY, State
from prunevolve.search.records import OUTCOMES, RESOLUTION, Candidate, Limits, Outcome, Record

SIZES = {1: "W", 2: "abs(W)", 3: "mul(G, W)", 4: "mul(G, sqrt(W))"}


def record(index: int, fitness: float | None, size: int = 1) -> Record:
    reason = "out of memory" if fitness is None else ""
    return record_of(index, SIZES[size], fitness, reason=reason)


THREE = Search(population=3)


def after(*outcomes: tuple, search: Search = THREE) -> State:
    state = State()
    for index, outcome in enumerate(outcomes):
        state = state.commit(record(index, *outcome), search)
    return state


def indices(records) -> list[int]:
    return [one.index for one in records]


@pytest.mark.parametrize("seed", range(2))
def test_commit_equals_a_sort_of_all_that_was_ever_evaluated(seed):
    draw = random.Random(seed)
    outcomes = [
        (draw.choice([None, draw.randrange(8) / 2]), draw.choice(list(SIZES))) for _ in range(40)
    ]
    evaluated = [(f, size, i) for i, (f, size) in enumerate(outcomes) if f is not None]
    state = after(*outcomes, search=Search(population=6))
    # Of equal fitness the smaller comes first, then the older.
    assert indices(state.population) == [index for *_, index in sorted(evaluated)[:6]]
    best_of = {size: min(e for e in evaluated if e[1] == size) for _, size, _ in evaluated}
    assert indices(state.hall_of_fame) == [best_of[size][2] for size in sorted(best_of)]
    assert state.committed == 40


def test_parsimony_puts_the_smaller_of_one_step_first_then_the_older():
    # 19.6, 20.4 and 20 are one step; 20.6 is the next.
    outcomes = [(steps * RESOLUTION, size) for steps, size in ((19.6, 3), (20.4, 1), (20.6, 1))]
    state = after(*outcomes, (20 * RESOLUTION, 3), search=Search(population=4))
    assert indices(state.population) == [1, 0, 3, 2]
    assert state.best == record(0, 19.6 * RESOLUTION, 3)


@pytest.mark.parametrize(
    ("fitness", "best", "entry"),
    [
        ((), 1.0, math.inf),
        # What is clearly worse than the best baseline need not be exact.
        *(((5.0, 2.0), 1.0, 2.0 * LEEWAY), ((5.0, 2.0, 3.0), 1.0, 5.0)),
        *(((0.8, 0.5), 0.5, 0.5 * LEEWAY), ((0.8, 0.5, 0.6), 0.5, 0.8)),
    ],
)
def test_limits_leave_leeway_while_a_place_is_free_and_then_are_by_the_worst(fitness, best, entry):
    state = after(*((value, 1) for value in fitness))
    assert state.with_limits(record(9, None).candidate, THREE).limits == (best, entry)


def test_what_descends_or_is_decided_has_no_limits():
    state, plain = after((5.0, 1), (2.0, 1), (3.0, 1)), record(9, None).candidate
    for own in ({"origin": "descent"}, {"decided": Outcome("duplicate")}):
        candidate = replace(plain, **own)
        assert state.with_limits(candidate, THREE) is candidate


def test_finalists_are_the_fittest_of_population_and_hall_of_fame_ties_by_age():
    state = after((9.0, 4), (1.0, 1), (2.0, 1), (3.0, 1), (8.0, 2), (9.0, 3))
    assert indices(state.finalists()) == [1, 2, 3, 4, 0]  # not 5
    assert State().finalists() == []


CRITERION = Criterion.parse("mul(W, sqrt(X))", "layer")
EVALUATED = Record(Candidate(7, CRITERION, "child", (2, 5), "ab12"), Outcome("evaluated", 2.5, 64))
FIELDS = EVALUATED.to_dict()
TUNED = Criterion.parse("mul(W, power(X, 0.37))", "layer")
refused = partial(refusal, Record.from_dict)


def read_back(record: Record) -> Record:
    return Record.from_dict(json.loads(json.dumps(record.to_dict())))


@pytest.mark.parametrize("kind", OUTCOMES)
@pytest.mark.parametrize("fitness", [0.1 + 0.2, -1.5, 5e-324])
def test_record_comes_back_from_json_as_it_was(kind, fitness):
    outcome = Outcome(kind, fitness if kind == "evaluated" else None, 64, "worker lost: \u00fc")
    for candidate in (Candidate(0, CRITERION), EVALUATED.candidate):
        # A resumed run reads records that do not know it; they are the same records.
        known = replace(candidate, limits=Limits(1.0, 3.5), decided=Outcome("duplicate"))
        assert read_back(Record(known, outcome)) == Record(candidate, outcome)
    keys = "index metric group origin start outcome fitness fingerprint tokens parents reason"
    assert list(FIELDS) == keys.split()


@pytest.mark.parametrize("tuned", [TUNED, CRITERION, None])
def test_descent_comes_back_with_what_it_began_with_and_what_it_led_to(tuned):
    outcome = replace(EVALUATED.outcome, tuned=tuned)
    record = Record(replace(EVALUATED.candidate, origin="descent", parents=(5,)), outcome)
    assert read_back(record) == record
    assert record.criterion == (tuned or CRITERION)  # that was measured
    line = record.to_dict()
    assert (line["metric"], record.size) == (record.criterion.text, record.criterion.metric.size)
    assert line["start"] == (CRITERION.text if tuned else None)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("tokens", 64.5, "valid integer"),
        ("fitness", math.nan, "finite number"),
        ("fitness", None, "None of a candidate that is evaluated"),
        ("parents", [2, 7], "of candidate 7 must be older"),
        ("metric", "mul(W, colsum(X))", ""),
        ("group", "2:4", "must be one of row, layer, model, outputs"),
        ("origin", "tuning", "Input should be"),
        ("speed", 1, "Extra inputs are not permitted"),
    ],
)
def test_record_with_a_field_that_breaks_its_rule_is_refused_in_one_line(name, value, rule):
    message = refused({**FIELDS, name: value})
    assert message.startswith(name) and rule in message and "\n" not in message
