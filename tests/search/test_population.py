"""States: who survives, who is remembered, who is chosen at the end."""

import operator
import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from toy_records import record_of

from pruning.criterion import Criterion
from search.population import Record, Rules, State, pareto_front

SIZES = {1: "W", 2: "abs(W)", 3: "mul(G, W)", 4: "mul(G, sqrt(W))"}
RULES = Rules(capacity=3)


def record(index: int, fitness: float | None, size: int = 1, group: str = "row") -> Record:
    reason = "out of memory" if fitness is None else ""
    return record_of(index, SIZES[size], fitness, group, reason=reason)


def after(*outcomes: tuple, rules: Rules = RULES) -> State:
    """The state after outcomes (fitness, size, group) were committed in order."""
    state = State()
    for index, outcome in enumerate(outcomes):
        state = state.commit(record(index, *outcome), rules)
    return state


def same_size(one: Criterion, other: Criterion) -> bool:
    """Stands for nearly equal masks: sizes are free to choose here."""
    return one.metric.size == other.metric.size


def always(one: Criterion, other: Criterion) -> bool:
    return True


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
    state = before.commit(record(2, None), RULES)
    assert state == replace(before, committed=3)


def test_commit_leaves_the_state_before_as_it_was():
    before = after((2.0, 1))
    before.commit(record(1, 1.0), RULES)
    assert before == after((2.0, 1))


@pytest.mark.parametrize("index", [0, 2])
def test_commit_takes_no_outcome_out_of_order(index):
    with pytest.raises(AssertionError):
        after((2.0, 1)).commit(record(index, 1.0), RULES)


@pytest.mark.parametrize("seed", range(5))
def test_commit_equals_a_sort_of_all_that_was_ever_evaluated(seed):
    draw = random.Random(seed)
    outcomes = [
        (draw.choice([None, draw.randrange(8) / 2]), draw.choice(list(SIZES))) for _ in range(40)
    ]
    evaluated = [(f, i, size) for i, (f, size) in enumerate(outcomes) if f is not None]
    state = after(*outcomes, rules=Rules(capacity=6))
    assert indices(state.population) == [index for _, index, _ in sorted(evaluated)[:6]]
    best_of = {size: min(e for e in evaluated if e[2] == size) for *_, size in evaluated}
    assert indices(state.hall_of_fame) == [best_of[size][1] for size in sorted(best_of)]


# Parsimony


def test_rank_within_a_step_puts_the_smaller_first_then_the_older():
    rules = Rules(capacity=4, resolution=0.1)
    # In tenths 20.4, 19.6 and 20 are one step; 20.6 is the next.
    state = after((1.96, 3), (2.04, 1), (2.06, 1), (2.0, 3), rules=rules)
    assert indices(state.population) == [1, 0, 3, 2]


def test_rank_without_a_resolution_is_by_fitness_alone():
    state = after((2.0, 1), (1.999, 4), rules=Rules(capacity=3, resolution=0.0))
    assert indices(state.population) == [1, 0]


def test_commit_drops_the_larger_of_a_step_even_if_it_is_fitter():
    rules = Rules(capacity=2, resolution=0.1)
    state = after((1.96, 4), (2.0, 2), (2.04, 1), rules=rules)
    assert indices(state.population) == [2, 1]


def test_best_is_by_fitness_whatever_the_resolution():
    state = after((1.96, 4), (2.04, 1), rules=Rules(capacity=2, resolution=0.1))
    assert indices(state.population) == [1, 0]
    assert state.best == record(0, 1.96, 4)


# Nearly equal masks

CROWDED = Rules(capacity=3, near=same_size)


def test_near_of_two_masks_only_the_fitter_is_a_member():
    state = after((3.0, 1), (2.0, 2), (2.5, 1), (2.1, 2), rules=CROWDED)
    assert indices(state.population) == [1, 2]


def test_near_of_two_equally_fit_the_older_stays():
    assert indices(after((2.0, 1), (2.0, 1), rules=CROWDED).population) == [0]


def test_near_compares_as_the_population_ranks():
    rules = Rules(capacity=3, resolution=0.1, near=always)
    assert indices(after((1.96, 4), (2.04, 1), rules=rules).population) == [1]


def test_near_to_several_replaces_them_all_by_one():
    like = Rules(capacity=4, near=lambda one, other: one.metric.size == 4 and other.metric.size < 3)
    state = after((3.0, 1), (2.5, 2), (2.8, 3), (2.0, 4), rules=like)
    assert indices(state.population) == [3, 2]


def test_near_to_several_and_less_fit_than_one_of_them_changes_nothing():
    like = Rules(capacity=4, near=lambda one, other: one.metric.size == 4)
    before = after((3.0, 1), (2.0, 2), rules=like)
    assert before.commit(record(2, 2.5, 4), like).population == before.population


def test_near_in_a_full_population_costs_no_other_member_its_place():
    state = after((1.0, 1), (2.0, 2), (3.0, 3), (1.5, 2), rules=CROWDED)
    assert indices(state.population) == [0, 3, 2]


def test_near_a_newcomer_that_is_turned_away_still_enters_the_hall_of_fame():
    like = Rules(capacity=3, near=always)
    state = after((2.0, 1), (2.5, 3), rules=like)
    assert indices(state.population) == [0]
    assert indices(state.hall_of_fame) == [0, 1]


# Groups

KEEPING = Rules(capacity=4, kept=2)
SOME_OF_TWO = ((9.0, 1, "layer"), (8.0, 1, "layer"), (7.0, 1, "layer"), (2.0, 1))


def test_kept_members_of_a_group_stay_however_they_rank():
    state = after(*SOME_OF_TWO, (3.0, 1), (1.0, 1), rules=KEEPING)
    assert [(one.index, one.criterion.group) for one in state.population] == [
        *((5, "row"), (3, "row"), (2, "layer"), (1, "layer")),
    ]


def test_kept_none_lets_the_fitter_group_take_all_places():
    state = after(*SOME_OF_TWO, (3.0, 1), (1.0, 1), (4.0, 1), rules=Rules(capacity=4))
    assert {one.criterion.group for one in state.population} == {"row"}


def test_kept_members_are_the_best_of_their_group():
    outcomes = (*SOME_OF_TWO, (1.0, 1), (3.0, 1), (6.0, 1, "layer"))
    state = after(*outcomes, rules=KEEPING)
    assert [one.index for one in state.population if one.criterion.group == "layer"] == [6, 2]


def test_worst_fitness_is_none_for_a_group_below_the_kept_ones():
    state = after(*SOME_OF_TWO, rules=KEEPING)
    assert len(state.population) == KEEPING.capacity
    assert state.worst_fitness("row", KEEPING) is None
    assert state.worst_fitness("model", KEEPING) is None
    assert state.worst_fitness("layer", KEEPING) == 9.0


def test_worst_fitness_counts_the_groups_alone_that_can_lose_a_member():
    state = after(*SOME_OF_TWO, (3.0, 1), rules=KEEPING)  # two of each
    assert state.worst_fitness("layer", KEEPING) == 8.0
    assert state.worst_fitness("row", KEEPING) == 3.0
    assert state.worst_fitness("row", Rules(capacity=4)) == 8.0


# Patience

PATIENT = Rules(capacity=3, patience=3, lag=2)
STALLED = ((2.0, 1), (3.0, 1), (3.5, 3), (None, 1))
"""The best is that of the first outcome; three more are without a better one."""


def test_patience_counts_outcomes_without_a_better_best():
    state = after(*STALLED[:3], rules=PATIENT)
    assert (state.improved, state.began, len(state.population)) == (1, 0, 3)
    assert after((2.0, 1), (3.0, 1), (1.5, 1), (4.0, 1), rules=PATIENT).improved == 3


def test_patience_at_its_end_begins_a_new_population_after_the_lag():
    state = after(*STALLED, rules=PATIENT)
    assert (state.population, state.began) == ((), 4 + 2)
    assert indices(state.hall_of_fame) == [0, 2]
    assert state.best == record(0, 2.0)


def test_patience_lets_no_child_of_the_given_up_population_join():
    state = after(*STALLED, (1.0, 1), (1.5, 3), (5.0, 1), rules=PATIENT)
    assert indices(state.population) == [6]
    assert indices(state.hall_of_fame) == [4, 5]
    assert state.best == record(4, 1.0)


def test_patience_begins_again_with_each_population():
    # Of the second, bred from 6 on, 8 and 9 are no better than 7; the eleventh outcome ends it.
    outcomes = [*STALLED, (9.0, 1), (9.0, 1), (5.0, 1), (4.0, 1), (4.5, 1), (4.5, 1)]
    assert after(*outcomes, rules=PATIENT).began == 6
    state = after(*outcomes, (4.5, 1), rules=PATIENT)
    assert (state.population, state.began) == ((), 11 + 2)


def test_patience_waits_as_long_for_a_population_without_any_member():
    outcomes = [*STALLED, *[(None, 1)] * 5]
    assert [after(*outcomes[:n], rules=PATIENT).began for n in (8, 9)] == [6, 9 + 2]


def test_patience_of_none_never_begins_anew():
    state = after((2.0, 1), *[(3.0, 1)] * 50)
    assert (state.began, state.improved) == (0, 1)


# All rules at once


@examples(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(0, 20).map(lambda n: n / 8)),
            st.sampled_from(list(SIZES)),
            st.sampled_from(("row", "layer", "model")),
        ),
        max_size=60,
    ),
    st.integers(2, 8),
    st.sampled_from((0.0, 0.5)),
    st.booleans(),
    st.sampled_from((None, 5)),
)
def test_commit_holds_its_promises_under_all_rules(
    outcomes, capacity, resolution, crowded, patience
):
    near = operator.eq if crowded else RULES.near
    kept = capacity // 3
    rules = Rules(capacity, resolution, near, kept, patience, lag=2)
    state = State()
    admitted = Counter()
    began = 0
    for index, outcome in enumerate(outcomes):
        one, before = record(index, *outcome), state
        limit = before.worst_fitness(one.criterion.group, rules)
        state = state.commit(one, rules)
        population = state.population
        criteria = [member.criterion for member in population]
        assert len(population) <= capacity
        assert list(population) == sorted(population, key=rules.rank)
        assert all(member.index >= before.began for member in population)
        assert not any(near(*pair) for pair in combinations(criteria, 2))
        if state.began != began:
            assert population == ()
            admitted, began = Counter(), state.began
        # No rule replaces a member by one of another group, unless the group has enough.
        members = Counter(criterion.group for criterion in criteria)
        assert all(members[group] >= min(kept, admitted[group]) for group in admitted)
        if one in population:
            group = one.criterion.group
            admitted[group] = max(admitted[group], members[group])
            replaced = any(near(one.criterion, m.criterion) for m in before.population)
            assert limit is None or replaced or one.fitness <= limit + resolution
        elif limit is None and one.fitness is not None and index >= before.began:
            assert population == () or any(near(one.criterion, other) for other in criteria)


# Hall of fame


def test_hall_of_fame_has_the_best_of_each_size_by_ascending_size():
    state = after((3.0, 4), (2.0, 1), (2.5, 4), (2.7, 4), (1.0, 3), (2.0, 1))
    assert [(one.size, one.index) for one in state.hall_of_fame] == [(1, 1), (3, 4), (4, 2)]


def test_hall_of_fame_remembers_what_the_population_has_dropped():
    state = after((9.0, 4), (1.0, 1), (2.0, 1), (3.0, 1))
    assert indices(state.population) == [1, 2, 3]
    assert indices(state.hall_of_fame) == [1, 0]


def test_pareto_front_holds_what_no_smaller_one_equals_or_beats():
    state = after((2.0, 4), (2.0, 2), (3.0, 1), (2.5, 3))
    assert indices(state.hall_of_fame) == [2, 1, 3, 0]
    # The oldest is only as good as a smaller one.
    assert indices(state.pareto_front) == [2, 1]


def test_pareto_front_of_any_records_is_that_of_the_best_of_each_size():
    records = [record(0, 3.0, 2), record(1, None), record(2, 2.0, 2), record(3, 4.0, 1)]
    assert indices(pareto_front(records)) == [3, 2]
    assert pareto_front([]) == ()


# Best, threshold, finalists


def test_best_is_the_fittest_or_none():
    assert State().best is None
    assert after((None, 1)).best is None
    assert after((2.0, 1), (1.0, 3)).best == record(1, 1.0, 3)


def test_worst_fitness_is_none_until_the_population_is_full():
    outcomes = [(2.0, 1), (None, 1), (5.0, 1), (3.0, 1), (1.0, 1)]
    found = [after(*outcomes[:count]).worst_fitness("row", RULES) for count in range(6)]
    assert found == [None, None, None, None, 5.0, 3.0]


def test_finalists_are_the_fittest_of_population_and_hall_of_fame_without_repeats():
    state = after((9.0, 4), (1.0, 1), (2.0, 1), (3.0, 1), (8.0, 2))
    assert indices(state.finalists(10)) == [1, 2, 3, 4, 0]
    assert indices(state.finalists(2)) == [1, 2]
    assert State().finalists(3) == []


def test_finalists_break_ties_by_age():
    assert indices(after((2.0, 4), (2.0, 1), (1.0, 2)).finalists(3)) == [2, 0, 1]
