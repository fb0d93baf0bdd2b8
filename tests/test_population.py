"""States: who survives, who is remembered, who is chosen at the end."""

import json
import random

import pytest

from search.population import Candidate, Outcome, Record, State

SIZES = {1: "W", 2: "abs(W)", 3: "mul(G, W)", 4: "mul(G, sqrt(W))"}


def record(index: int, fitness: float | None, size: int = 1) -> Record:
    outcome = "failed" if fitness is None else "evaluated"
    reason = "out of memory" if fitness is None else ""
    return Record(index, SIZES[size], "row", outcome, fitness, "ab12", 64, (), reason)


def after(*outcomes: tuple[float | None, int], capacity: int = 3) -> State:
    """The state after outcomes of these fitnesses and sizes were committed in order."""
    state = State()
    for index, (fitness, size) in enumerate(outcomes):
        state = state.commit(record(index, fitness, size), capacity)
    return state


def indices(records) -> list[int]:
    return [one.index for one in records]


# Commit


def test_commit_keeps_the_population_best_first():
    assert indices(after((3.0, 1), (1.0, 1), (2.0, 1)).population) == [1, 2, 0]


def test_commit_drops_the_worst_beyond_the_capacity():
    state = after((3.0, 1), (1.0, 1), (2.0, 1), (2.5, 1), (4.0, 1))
    assert indices(state.population) == [1, 2, 3]
    assert state.committed == 5


def test_commit_breaks_ties_by_age():
    state = after((2.0, 1), (2.0, 1), (1.0, 1), (2.0, 1))
    assert indices(state.population) == [2, 0, 1]


def test_commit_counts_an_outcome_without_fitness_and_changes_nothing_else():
    before = after((2.0, 1), (1.0, 3))
    state = before.commit(record(2, None), 3)
    assert state == State(3, before.population, before.hall_of_fame)


def test_commit_leaves_the_state_before_as_it_was():
    before = after((2.0, 1))
    before.commit(record(1, 1.0), 3)
    assert before == after((2.0, 1))


@pytest.mark.parametrize("index", [0, 2])
def test_commit_takes_no_outcome_out_of_order(index):
    with pytest.raises(AssertionError):
        after((2.0, 1)).commit(record(index, 1.0), 3)


@pytest.mark.parametrize("seed", range(5))
def test_commit_equals_a_sort_of_all_that_was_ever_evaluated(seed):
    draw = random.Random(seed)
    outcomes = [
        (draw.choice([None, draw.randrange(8) / 2]), draw.choice(list(SIZES))) for _ in range(40)
    ]
    evaluated = [(f, i, size) for i, (f, size) in enumerate(outcomes) if f is not None]
    state = after(*outcomes, capacity=6)
    assert indices(state.population) == [index for _, index, _ in sorted(evaluated)[:6]]
    best_of = {size: min(e for e in evaluated if e[2] == size) for *_, size in evaluated}
    assert indices(state.hall_of_fame) == [best_of[size][1] for size in sorted(best_of)]


# Hall of fame


def test_hall_of_fame_has_the_best_of_each_size_by_ascending_size():
    state = after((3.0, 4), (2.0, 1), (2.5, 4), (2.7, 4), (1.0, 3), (2.0, 1))
    assert [(one.size, one.index) for one in state.hall_of_fame] == [(1, 1), (3, 4), (4, 2)]


def test_hall_of_fame_remembers_what_the_population_has_dropped():
    state = after((9.0, 4), (1.0, 1), (2.0, 1), (3.0, 1))
    assert indices(state.population) == [1, 2, 3]
    assert indices(state.hall_of_fame) == [1, 0]


# Best, threshold, finalists


def test_best_is_the_fittest_or_none():
    assert State().best is None
    assert after((None, 1)).best is None
    assert after((2.0, 1), (1.0, 3)).best == record(1, 1.0, 3)


def test_worst_fitness_is_none_until_the_population_is_full():
    outcomes = [(2.0, 1), (None, 1), (5.0, 1), (3.0, 1), (1.0, 1)]
    found = [after(*outcomes[:count]).worst_fitness(3) for count in range(6)]
    assert found == [None, None, None, None, 5.0, 3.0]


def test_finalists_are_the_fittest_of_population_and_hall_of_fame_without_repeats():
    state = after((9.0, 4), (1.0, 1), (2.0, 1), (3.0, 1), (8.0, 2))
    assert indices(state.finalists(10)) == [1, 2, 3, 4, 0]
    assert indices(state.finalists(2)) == [1, 2]
    assert State().finalists(3) == []


def test_finalists_break_ties_by_age():
    assert indices(after((2.0, 4), (2.0, 1), (1.0, 2)).finalists(3)) == [2, 0, 1]


# Records


def test_record_of_joins_a_candidate_and_its_outcome():
    candidate = Candidate(7, "W", "layer", (2, 5), "ab12", 3.5)
    outcome = Outcome("stopped", None, 32, "NLL rise 2.0 above 1.0")
    assert Record.of(candidate, outcome) == Record(
        *(7, "W", "layer", "stopped", None, "ab12", 32, (2, 5), "NLL rise 2.0 above 1.0")
    )


@pytest.mark.parametrize("fitness", [None, 2.5, 0.1 + 0.2, 3.0])
def test_record_comes_back_from_json_as_it_was(fitness):
    one = record(3, fitness)
    assert Record.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_record_size_is_the_number_of_nodes():
    assert [record(0, 1.0, size).size for size in SIZES] == [1, 2, 3, 4]


FIELDS = record(0, 1.0).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "not a journal record: {}"),
        (7, "not a journal record: 7"),
        ({**FIELDS, "parents": None}, "not a journal record: {'index': 0"),
        ({**FIELDS, "more": 1}, "not a journal record: {'index': 0"),
        (
            {**FIELDS, "outcome": "won"},
            "outcome must be one of ('evaluated', 'stopped', 'duplicate', 'degenerate', "
            "'failed'), got 'won'",
        ),
        (
            {**FIELDS, "fitness": None},
            "fitness must be a finite number if evaluated, otherwise null, got None of evaluated",
        ),
        (
            {**FIELDS, "fitness": float("inf")},
            "fitness must be a finite number if evaluated, otherwise null, got inf of evaluated",
        ),
        (
            {**FIELDS, "outcome": "stopped"},
            "fitness must be a finite number if evaluated, otherwise null, got 1.0 of stopped",
        ),
    ],
)
def test_record_from_dict_refuses_what_is_none(fields, message):
    with pytest.raises(ValueError) as error:
        Record.from_dict(fields)
    assert str(error.value).startswith(message)
