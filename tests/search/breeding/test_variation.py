"""The breeder: seeds first, then random metrics, then children of a population's members."""

import random

import pytest
from toy_records import record_of

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.search.breeding.variation import Breeder, choose_parents, seeded

SEARCH = Search(seed=5, population=4, initial_depth=(1, 3))
TEXTS = ("mul(W, sqrt(X))", "mul(G, W)", "add(G, W)", "W")
MEMBERS = tuple(record_of(index, text, 2.0 + index) for index, text in enumerate(TEXTS))


def bred(group="row", seeds=(), **changes):
    seed_criteria = tuple(Criterion.parse(text, group) for text in seeds)
    breeder = Breeder(SEARCH.model_copy(update=changes), group, seed_criteria)
    return [breeder.breed(index, MEMBERS) for index in range(60)]


def test_breed_gives_the_seeds_first_in_the_canonical_form_of_their_group():
    for group, expected in (("row", ["W", "W", "W"]), ("model", ["mms(W)", "W", "W"])):
        candidates = bred(group, ("mms(W)", "mul(W, W)", "W"))
        assert [candidate.criterion.text for candidate in candidates[:3]] == expected


@pytest.mark.parametrize(
    ("settings", "group", "core"),
    [
        ({}, "model", "mul(G, W)"),
        ({}, "row", "W"),
        ({"terminals": ["W", "X"]}, "model", "quot(W, rowmean(W))"),
        ({"primitives": "release"}, "model", None),
    ],
)
def test_breed_gives_the_core_first_if_there_are_no_seeds(settings, group, core):
    first, second, *_ = bred(group, **settings)
    assert (first.criterion.text == core) == (first.origin == "seed") == (core is not None)
    assert second.origin == "random"


@pytest.mark.parametrize(
    ("primitives", "parents", "terminals"), [("extended", 1, "WGXVHM"), ("release", 2, "WGX")]
)
def test_breed_gives_random_metrics_until_the_population_was_bred_once_then_children(
    primitives, parents, terminals
):
    candidates = bred(primitives=primitives)
    assert [candidate.parents for candidate in candidates[:4]] == [()] * 4
    children = [candidate for candidate in candidates[4:] if candidate.parents]
    assert len(children) > 20
    assert {candidate.origin for candidate in candidates[1:4]} == {"random"}
    assert {candidate.origin for candidate in candidates if candidate.parents} == {"child"}
    for child in children:
        assert len({*child.parents}) == parents
        assert child.criterion.text not in [TEXTS[parent] for parent in child.parents]
    for named, expected in (({}, terminals), ({"terminals": ["W", "X"]}, "WX")):
        drawn = bred(primitives=primitives, population=60, **named)
        found = frozenset().union(*(one.criterion.metric.terminals for one in drawn))
        assert found == set(expected)


def test_seeded_draws_the_same_from_the_same_key_and_puts_the_state_back():
    def draws(*key):
        with seeded(*key):
            return [random.random() for _ in range(3)]

    random.seed(0)
    before = random.getstate()
    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*key)) for key in [(1, 2), (2, 1), (12,), (1, 3), (3, 0)]}) == 5
    with pytest.raises(KeyError), seeded(1):
        random.random()
        raise KeyError
    assert random.getstate() == before


def test_choose_parents_draws_two_different_members_from_the_best_of_a_random_half():
    drawn = set()
    for seed in range(400):
        with seeded(seed):
            first, second = choose_parents(range(20), best=2, count=2)
        assert first != second
        drawn |= {first, second}
    # The two best of ten: the worst eight of twenty can never be among them.
    assert drawn <= set(range(12))
    assert max(drawn) > 4
    with seeded(0):
        assert set(choose_parents(("a", "b"), best=10, count=2)) == {"a", "b"}
        assert choose_parents(("a",), best=2, count=2) == ["a", "a"]
