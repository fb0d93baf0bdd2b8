"""A journal's line: it comes back as it was, and whatever is not one is refused by name."""

import json
import math
from dataclasses import replace

import pytest
from toy_records import record_of

from pruning.criterion import Criterion
from search.population import OUTCOMES, Candidate, Outcome, Record

CRITERION = Criterion.parse("mul(W, sqrt(X))", "layer")
EVALUATED = Record(
    Candidate(7, CRITERION, (2, 5), "ab12"), Outcome("evaluated", 2.5, 64, rises=(0.75, None))
)
FIELDS = {
    "index": 7,
    "metric": "mul(W, sqrt(X))",
    "group": "layer",
    "outcome": "evaluated",
    "fitness": 2.5,
    "fingerprint": "ab12",
    "tokens": 64,
    "parents": (2, 5),
    "reason": "",
    "estimate": None,
    "rises": (0.75, None),
}


def refusal(fields: object) -> str:
    with pytest.raises(ValueError) as error:
        Record.from_dict(fields)
    assert "\n" not in str(error.value)
    return str(error.value)


# There and back


def test_to_dict_has_the_contracts_fields_in_their_order():
    assert list(EVALUATED.to_dict().items()) == list(FIELDS.items())


def test_from_dict_reads_what_to_dict_wrote():
    assert Record.from_dict(FIELDS) == EVALUATED


@pytest.mark.parametrize("fitness", [None, 2.5, 0.1 + 0.2, 3.0, -1.5])
def test_record_comes_back_from_json_as_it_was(fitness):
    record = record_of(3, "W", fitness, reason="worker lost: \u00fc")
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize("kind", OUTCOMES[1:])
def test_record_of_every_kind_comes_back_without_fingerprint_or_parents(kind):
    record = Record(Candidate(0, CRITERION), Outcome(kind, reason="why"))
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_record_does_not_tell_how_its_candidate_came_to_its_outcome():
    # A resumed run reads records that know neither; they are the same records.
    way = {"stop_above": 3.5, "decided": Outcome("duplicate")}
    record = Record(replace(EVALUATED.candidate, **way), EVALUATED.outcome)
    assert record == EVALUATED
    assert record.to_dict() == FIELDS


def test_record_shows_what_is_asked_of_it_most():
    assert (EVALUATED.index, EVALUATED.criterion) == (7, CRITERION)
    assert (EVALUATED.fitness, EVALUATED.size, EVALUATED.rank) == (2.5, 4, (2.5, 7))


@pytest.mark.parametrize(
    ("metric", "size"), [("W", 1), ("abs(W)", 2), ("mul(G, W)", 3), ("mul(G, sqrt(W))", 4)]
)
def test_size_is_the_number_of_nodes(metric, size):
    assert record_of(0, metric, 1.0).size == size


# Refusals


@pytest.mark.parametrize("fields", [None, 7, "line", [], {}, [FIELDS]])
def test_from_dict_refuses_what_is_no_object_of_a_record(fields):
    assert refusal(fields) == f"not a journal record: {str(fields)[:80]}"


@pytest.mark.parametrize("name", FIELDS)
def test_from_dict_refuses_a_missing_field(name):
    fields = {key: value for key, value in FIELDS.items() if key != name}
    assert refusal(fields).startswith("not a journal record: {'")


def test_from_dict_refuses_an_unknown_field():
    assert refusal({**FIELDS, "speed": 1}).startswith("not a journal record: {'index': 7, ")


COUNT = "a whole number from 0"
KIND = "one of evaluated, stopped, duplicate, degenerate, failed"
FITNESS = "a finite number or null"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *(("index", value, COUNT) for value in (-1, 7.0, True, "7", None)),
        *(("tokens", value, COUNT) for value in (-64, 64.0, False, "64", None)),
        *(("metric", value, "a text") for value in (None, 7, ["W"])),
        *(("group", value, "a text") for value in (None, 7, ["row"])),
        *(("reason", value, "a text") for value in (None, 7, ["why"])),
        *(("fingerprint", value, "a text or null") for value in (7, b"ab12", ["ab12"])),
        *(("outcome", value, KIND) for value in ("won", "", None, 0, ["evaluated"])),
        *(("fitness", value, FITNESS) for value in (math.nan, math.inf, -math.inf, "2.5", 2, True)),
        *(("parents", value, "a list of indices") for value in (None, 5, "25", {"2": 5})),
        *(("parents", [value], "a list of indices") for value in (-1, 2.0, True, "2", None)),
    ],
)
def test_from_dict_refuses_a_field_that_breaks_its_rule(name, value, rule):
    assert refusal({**FIELDS, name: value}) == f"{name} must be {rule}, got {value!r:.40}"


@pytest.mark.parametrize("parents", [(7,), (2, 7), (8, 2), (100,)])
def test_from_dict_refuses_parents_that_are_not_older(parents):
    assert refusal({**FIELDS, "parents": parents}) == f"parents must be older than 7, got {parents}"


@pytest.mark.parametrize("kind", OUTCOMES[1:])
def test_from_dict_refuses_a_fitness_of_what_was_not_evaluated(kind):
    assert refusal({**FIELDS, "outcome": kind}) == (
        f"fitness must be a finite number if evaluated, otherwise null, got 2.5 of {kind}"
    )


def test_from_dict_refuses_an_evaluation_without_a_fitness():
    assert refusal({**FIELDS, "fitness": None}) == (
        "fitness must be a finite number if evaluated, otherwise null, got None of evaluated"
    )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("", "metric "),
        ("mul(W", "metric "),
        ("mul(W, Q)", "metric "),
        ("__import__('os')", "metric "),
        ("X", "metric 'X' gives every row the same scores: "),
        ("7", "metric '7' gives all weights one score: "),
        ("mul(W, colsum(X))", "metric 'mul(W, colsum(X))' has colsum(X): "),
    ],
)
def test_from_dict_refuses_a_metric_that_is_none(metric, message):
    assert refusal({**FIELDS, "metric": metric}).startswith(message)


@pytest.mark.parametrize("group", ["column", "", "Row", "2:4"])
def test_from_dict_refuses_an_unknown_group(group):
    expected = f"group must be one of row, layer, model, got {group!r}"
    assert refusal({**FIELDS, "group": group}) == expected
