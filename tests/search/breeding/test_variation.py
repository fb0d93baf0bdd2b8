"""What the breeder draws with, and from whom."""

import random

import pytest

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.search.breeding.factors import Products
from prunevolve.search.breeding.trees import Trees
from prunevolve.search.breeding.variation import Breeder, choose_parents, seeded


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
            first, second = choose_parents(range(20), best=2)
        assert first != second
        drawn |= {first, second}
    # The two best of ten: the worst eight of twenty can never be among them.
    assert drawn <= set(range(12))
    assert max(drawn) > 4
    with seeded(0):
        assert set(choose_parents(("a", "b"), best=10)) == {"a", "b"}
        assert choose_parents(("a",), best=2) == ("a", "a")


@pytest.mark.parametrize(
    ("primitives", "kind", "terminals"),
    [("release", Trees, "WGX"), ("extended", Products, "WGXVHM")],
)
def test_breeder_varies_trees_of_the_releases_set_and_products_else(primitives, kind, terminals):
    breeder = Breeder(Search(primitives=primitives), "model", (Criterion.parse("W", "model"),))
    assert isinstance(breeder.varied, kind)
    assert breeder.terminals == tuple(terminals)
    named = Breeder(Search(primitives=primitives, terminals=["W", "X"]), "model")
    assert named.terminals == ("W", "X")
    mapping = named.varied.primitives.mapping
    assert {"W", "X"} <= set(mapping) and not {"G", "V"} & set(mapping)


@pytest.mark.parametrize(
    ("group", "units", "comparable"),
    [("model", "required", True), ("model", "off", False), ("row", "required", False)],
)
def test_units_count_where_layers_compete_and_they_are_required(group, units, comparable):
    breeder = Breeder(Search(units=units), group)
    assert breeder.comparable is breeder.varied.comparable is comparable
