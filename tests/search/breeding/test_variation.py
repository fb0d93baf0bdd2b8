"""Breeding obeys its limits, leaves parents alone, and is repeatable from its key."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from deap import gp
from hypothesis import given, settings
from hypothesis import strategies as st

from prunevolve.configs.schema import MAX_TREE_DEPTH, Search
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX, NUMBER, PER_INPUT, PER_OUTPUT, SETS
from prunevolve.pruning.statistics import TERMINAL_SETS
from prunevolve.search.breeding.primitives import (
    BLANK,
    fill_in_numbers,
    size_of,
    to_metric,
    to_tree,
)
from prunevolve.search.breeding.variation import (
    MUTATIONS,
    TRIES,
    Breeder,
    child_of,
    choose_parents,
    random_metric,
    seeded,
)

SEARCH = Search(initial_depth=(1, 3), max_size=13)
RELEASE = Breeder(SEARCH.model_copy(update={"primitives": "release"}), "row")
EXTENDED = Breeder(SEARCH, "row")
BOTH = pytest.mark.parametrize("breeder", [RELEASE, EXTENDED], ids=["release", "extended"])
FIRST = Metric.parse("mul(W, sqrt(X))")
SECOND = Metric.parse("add(mms(G), neg(log(W)))")


def changed(breeder, **changes):
    return replace(breeder, search=breeder.search.model_copy(update=changes))


def parents(seed, breeder=RELEASE):
    with seeded(seed):
        return random_metric(breeder), random_metric(breeder)


def children(breeder, count, first=FIRST, second=SECOND):
    bred = []
    for seed in range(count):
        with seeded(seed):
            bred.append(child_of(first, second, breeder))
    return bred


def is_within_limits(metric, breeder=RELEASE):
    small = metric.depth <= MAX_TREE_DEPTH and metric.size <= breeder.search.max_size
    return small and not metric.problem


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_tree_gives_its_metric_back_node_for_node(seed):
    # Also from the tree of a set that its operators, terminals and numbers are not drawn from.
    powers = Metric.parse("mul(power(W, 1.3), sqr(power(X, 0.2)))")
    for metric in (parents(seed)[0], parents(seed, EXTENDED)[0], powers):
        for breeder in (RELEASE, EXTENDED):
            tree = to_tree(metric, breeder.primitives)
            assert to_metric(tree) == metric
            assert (size_of(tree), tree.height) == (metric.size, metric.depth)


def test_drawn_numbers_have_three_digits_and_the_range_of_the_set():
    blank = gp.PrimitiveTree([EXTENDED.primitives.mapping[BLANK]])
    with seeded(0):
        trees = [fill_in_numbers(blank[:], EXTENDED.primitives) for _ in range(600)]
    values = [float(node.name) for (node,) in trees]
    assert all(1e-3 <= abs(value) <= 1e3 and value == float(f"{value:.3g}") for value in values)
    assert 0.04 < sum(value < 0 for value in values) / len(values) < 0.16
    assert min(map(abs, values)) < 1e-2 and max(map(abs, values)) > 1e2


@BOTH
def test_random_metrics_reach_every_depth_and_every_primitive(breeder):
    drawn = [parents(seed, breeder)[0] for seed in range(800)]
    assert {metric.depth for metric in drawn} == {1, 2, 3}
    name = "release" if breeder is RELEASE else "extended"
    names = {node.name for metric in drawn for node in metric.nodes() if not node.is_constant}
    assert names == {*SETS[name], *TERMINAL_SETS[name]}


def test_random_metric_falls_back_where_the_limits_allow_nothing():
    deep = changed(RELEASE, initial_depth=(7, 7), max_size=3)
    with seeded(0):
        assert random_metric(deep) == Metric("W")
        assert random_metric(replace(deep, group="model")) == Metric.parse("mul(W, G)")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([RELEASE, EXTENDED]))
def test_random_metrics_and_children_are_within_the_limits(seed, breeder):
    first, second = parents(seed, breeder)
    texts = first.text, second.text
    with seeded(seed, 1):
        child = child_of(first, second, breeder)
    assert all(is_within_limits(metric) for metric in (first, second, child))
    assert all(1 <= parent.depth <= 3 for parent in (first, second))
    assert (first.text, second.text) == texts


def test_child_by_crossover_alone_is_made_of_its_parents_nodes():
    allowed = Counter(node.name for parent in (FIRST, SECOND) for node in parent.nodes())
    bred = children(changed(RELEASE, crossover=1, mutation=0), 50)
    assert all(Counter(node.name for node in child.nodes()) <= allowed for child in bred)
    assert len(set(bred)) > 5
    # Without variation it is the first parent.
    assert set(children(changed(RELEASE, crossover=0, mutation=0), 3)) == {FIRST}


def test_child_of_a_metric_above_the_limit_is_no_larger_than_it():
    bred = children(changed(RELEASE, max_size=2), 50)
    assert max(child.size for child in bred) == FIRST.size > 2
    assert len(set(bred)) > 5


@BOTH
def test_mutations_are_those_that_are_named_each_as_often_as_its_weight(breeder, monkeypatch):
    drawn = Counter()
    for name in MUTATIONS:

        def counted(tree, primitives, name=name):
            drawn[name] += 1
            return tree

        monkeypatch.setitem(MUTATIONS, name, (counted, MUTATIONS[name][1]))
    named = changed(breeder, crossover=0, mutation=1, mutations=["node", "factor"])
    children(named, 6)  # a parent is drawn again, here in vain
    expected = {"node": 1 / 5, "factor": 4 / 5}
    drawn_shares = {name: count / (6 * TRIES) for name, count in drawn.items()}
    assert drawn_shares == pytest.approx(expected, rel=0.3)


def mutated(name, metric, breeder, seed):
    mutate, _ = MUTATIONS[name]
    with seeded(seed, 2):
        return to_metric(mutate(to_tree(metric, breeder.primitives), breeder.primitives))


@BOTH
def test_factor_mutation_draws_the_worth_of_a_row_an_input_a_layer_or_a_matrix(breeder):
    products = [mutated("factor", Metric("W"), breeder, seed) for seed in range(400)]
    assert {product.name for product in products} <= {"mul", "quot"}
    factors = [product.operands[1] for product in products]
    assert all(factor.never_negative for factor in factors)
    matrices = [factor.text for factor in factors if factor.shape == MATRIX]
    assert all(re.search(r"quot\((.), (row|col)mean\(\1\)\)", text) for text in matrices)
    shapes = {factor.shape for factor in factors}
    if breeder is RELEASE:
        assert shapes == {PER_INPUT}
    else:
        assert shapes == {MATRIX, PER_INPUT, PER_OUTPUT, NUMBER}
        assert len(set(factors)) > 150


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


COMPARABLE = changed(replace(EXTENDED, group="model"), max_size=25)


def test_comparable_trees_and_children_have_no_units_and_stay_within_the_limits():
    different = 0
    for seed in range(100):
        first, second = parents(seed, COMPARABLE)
        with seeded(seed, 1):
            child = child_of(first, second, COMPARABLE)
        assert all(metric.is_comparable for metric in (first, second, child))
        assert is_within_limits(child, COMPARABLE)
        different += child != first
    assert different > 50
    with_units = [parents(seed, EXTENDED)[0] for seed in range(100)]
    assert sum(metric.is_comparable for metric in with_units) < 30
