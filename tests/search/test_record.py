"""A journal's line: it comes back as it was, and whatever is not one is refused by name."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from refusals import refusal

from pruning.criterion import Criterion
from search.population import OUTCOMES, Candidate, Outcome, Record

CRITERION = Criterion.parse("mul(W, sqrt(X))", "layer")
EVALUATED = Record(
    Candidate(7, CRITERION, (2, 5), "ab12"), Outcome("evaluated", 2.5, 64, rises=(0.75, None))
)
FIELDS = EVALUATED.to_dict()
COUNT = "a whole number from 0"
refused = partial(refusal, Record.from_dict)
KIND = "one of evaluated, stopped, duplicate, degenerate, failed"
FITNESS = "a finite number or null"


@pytest.mark.parametrize("kind", OUTCOMES)
@pytest.mark.parametrize("fitness", [2.5, 0.1 + 0.2, 3.0, -1.5])
def test_record_comes_back_from_json_as_it_was(kind, fitness):
    outcome = Outcome(kind, fitness if kind == "evaluated" else None, 64, "worker lost: \u00fc")
    for candidate in (Candidate(0, CRITERION), EVALUATED.candidate):
        record = Record(candidate, outcome)
        assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_record_does_not_tell_how_its_candidate_came_to_its_outcome():
    # A resumed run reads records that know neither; they are the same records.
    way = {"stop_above": 3.5, "decided": Outcome("duplicate")}
    record = Record(replace(EVALUATED.candidate, **way), EVALUATED.outcome)
    assert record == EVALUATED
    assert record.to_dict() == FIELDS


@pytest.mark.parametrize("fields", [None, "line", [], {}, [FIELDS]])
def test_record_of_no_object_is_refused(fields):
    assert refused(fields) == f"not a journal record: {str(fields)[:80]}"


def test_record_with_a_missing_or_an_unknown_field_is_refused():
    assert refused({**FIELDS, "speed": 1}).startswith("not a journal record: {'index': 7, ")
    for name in FIELDS:
        fields = {key: value for key, value in FIELDS.items() if key != name}
        assert refused(fields).startswith("not a journal record: {'")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *(("index", value, COUNT) for value in (-1, 7.0, True, "7", None)),
        *(("tokens", value, COUNT) for value in (-64, False)),
        *(("metric", value, "a text") for value in (None, ["W"])),
        *(("group", value, "a text") for value in (None, 7)),
        *(("reason", value, "a text") for value in (None, 7)),
        *(("fingerprint", value, "a text or null") for value in (7, b"ab12")),
        *(("outcome", value, KIND) for value in ("won", None, ["evaluated"])),
        *(("fitness", value, FITNESS) for value in (math.nan, math.inf, "2.5", 2, True)),
        *(("parents", value, "a list of indices") for value in (None, "25", {"2": 5}, [-1], [2.0])),
        *(("parents", value, "older than 7") for value in ((7,), (8, 2))),
        ("group", "2:4", "one of row, layer, model"),
    ],
)
def test_record_with_a_field_that_breaks_its_rule_is_refused(name, value, rule):
    assert refused({**FIELDS, name: value}) == f"{name} must be {rule}, got {value!r:.40}"


@pytest.mark.parametrize("changes", [{"outcome": "stopped"}, {"fitness": None}])
def test_record_has_a_fitness_if_and_only_if_it_was_evaluated(changes):
    rule = "fitness must be a finite number if evaluated, otherwise null, got "
    assert refused({**FIELDS, **changes}).startswith(rule)


@pytest.mark.parametrize("metric", ["", "mul(W", "__import__('os')", "X", "7", "mul(W, colsum(X))"])
def test_record_of_a_metric_that_cannot_rank_weights_is_refused(metric):
    assert refused({**FIELDS, "metric": metric}).startswith("metric ")
