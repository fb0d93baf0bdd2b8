"""Breeding obeys its limits, leaves parents alone, and is repeatable from its key."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from deap import gp
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.leaves import LEAF_SETS
from pruning.metric import Metric
from pruning.operators import MATRIX, NUMBER, PER_INPUT, PER_OUTPUT, SETS
from search.breeding.primitives import (
    BLANK,
    drawn_leaves,
    fill_in_numbers,
    primitive_set,
    to_metric,
    to_tree,
)
from search.breeding.variation import (
    MUTATIONS,
    Variation,
    child_of,
    choose_parents,
    random_metric,
    seeded,
    with_means,
)

PRIMITIVES = primitive_set("release")
VARIATION = Variation(
    primitives=PRIMITIVES,
    min_initial_depth=1,
    max_initial_depth=3,
    products=0.0,
    max_depth=5,
    max_size=13,
    crossover=0.7,
    exchange=0.0,
    mutation=0.6,
    mutations=dict.fromkeys(MUTATIONS, 1),
)
EXTENDED = replace(VARIATION, primitives=primitive_set("extended"))
BOTH = pytest.mark.parametrize("variation", [VARIATION, EXTENDED], ids=["release", "extended"])
FIRST = Metric.parse("mul(W, sqrt(X))")
SECOND = Metric.parse("add(mms(G), neg(log(W)))")


def parents(seed: int, variation: Variation = VARIATION) -> tuple[Metric, Metric]:
    with seeded(seed):
        return random_metric(variation), random_metric(variation)


def is_within_limits(metric: Metric, variation: Variation = VARIATION) -> bool:
    small = metric.depth <= variation.max_depth and metric.size <= variation.max_size
    return small and not metric.problem


# The random generator


def test_seeded_draws_the_same_from_the_same_key_and_other_from_another():
    def draws(*key):
        with seeded(*key):
            return [random.random() for _ in range(3)]

    assert draws(1, 2) == draws(1, 2)
    assert len({tuple(draws(*key)) for key in [(1, 2), (2, 1), (12,), (1, 3), (3, 0)]}) == 5


def test_seeded_puts_the_state_back_even_after_an_error():
    random.seed(0)
    before = random.getstate()
    with pytest.raises(KeyError), seeded(1):
        random.random()
        raise KeyError
    assert random.getstate() == before


# Trees and metrics


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_a_metric_comes_back_from_its_tree_node_for_node(seed):
    # Also from the tree of a set that its operators, leaves and numbers are not drawn from.
    for metric in (parents(seed)[0], parents(seed, EXTENDED)[0]):
        for variation in (VARIATION, EXTENDED):
            tree = to_tree(metric, variation.primitives)
            assert to_metric(tree) == metric
            assert (len(tree), tree.height) == (metric.size, metric.depth)


def test_drawn_numbers_have_three_digits_and_the_range_of_the_set():
    blank = gp.PrimitiveTree([EXTENDED.primitives.mapping[BLANK]])
    with seeded(0):
        trees = [fill_in_numbers(blank[:], EXTENDED.primitives) for _ in range(600)]
    values = [float(node.name) for (node,) in trees]
    assert all(1e-3 <= abs(value) <= 1e3 and value == float(f"{value:.3g}") for value in values)
    assert 0.04 < sum(value < 0 for value in values) / len(values) < 0.16
    assert min(map(abs, values)) < 1e-2 and max(map(abs, values)) > 1e2


# Random metrics


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_metric_is_within_the_limits_and_the_initial_depths(seed):
    for metric in (parents(seed)[0], parents(seed, EXTENDED)[0]):
        assert is_within_limits(metric)
        assert 1 <= metric.depth <= 3


@BOTH
def test_random_metrics_reach_every_depth_and_every_primitive(variation):
    drawn = [parents(seed, variation)[0] for seed in range(800)]
    assert {metric.depth for metric in drawn} == {1, 2, 3}
    name = "release" if variation is VARIATION else "extended"
    names = {node.name for metric in drawn for node in metric.nodes() if not node.is_constant}
    assert names == {*SETS[name], *LEAF_SETS[name]}


def test_leaves_that_are_left_out_are_never_drawn():
    primitives = primitive_set("extended", ("D", "H", "G"))
    variation = replace(EXTENDED, primitives=primitives, products=0.5)
    names = {n.name for seed in range(800) for n in parents(seed, variation)[0].nodes()}
    assert names & set(LEAF_SETS["extended"]) == {*LEAF_SETS["extended"]} - {"D", "H", "G"}


@pytest.mark.parametrize(
    ("name", "without", "message"),
    [
        ("release", ["M"], "leaves of the release set, W, G, X; got 'M'"),
        ("extended", ["D", "depth"], "got 'depth'"),
        ("extended", ["W"], "must leave W, .* got W$"),
        ("extended", ["G", "M"], "must leave W, another leaf .* got G, M$"),
        ("release", ["X"], "and one that does not, got X$"),
    ],
)
def test_leaves_that_cannot_be_left_out_are_refused(name, without, message):
    with pytest.raises(ValueError, match=message):
        drawn_leaves(name, without)


@BOTH
def test_products_are_two_or_three_factors_that_never_turn_the_order_round(variation):
    products = replace(variation, products=1.0)
    drawn = [parents(seed, products)[0] for seed in range(300)]
    sizes = set()
    for metric in drawn:
        assert is_within_limits(metric, products)
        factors = factors_of(metric)
        sizes.add(len(factors))
        assert all(factor.never_negative for factor in factors)
        assert factors[0].shape == MATRIX
    assert sizes == {2, 3}
    assert frozenset("WG") in {metric.leaves for metric in drawn}
    assert len({metric.text for metric in drawn}) > 150


def factors_of(metric: Metric) -> list[Metric]:
    """Return the factors of a product that is nested in its first operand."""
    if metric.name not in ("mul", "quot"):
        return [metric]
    return [*factors_of(metric.operands[0]), metric.operands[1]]


def test_a_fraction_of_random_metrics_are_products():
    def count(fraction):
        drawn = [parents(seed, replace(EXTENDED, products=fraction))[0] for seed in range(300)]
        return sum(len(factors_of(metric)) > 1 for metric in drawn)

    assert count(0.0) < 75 < count(0.5) < 225 < count(1.0)


def test_random_metric_falls_back_to_magnitude_where_the_limits_allow_nothing():
    with seeded(0):
        assert random_metric(replace(VARIATION, max_depth=0)) == Metric("W")


# Children


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([VARIATION, EXTENDED]))
def test_child_is_within_the_limits_and_its_parents_are_unchanged(seed, variation):
    first, second = parents(seed, variation)
    texts = first.text, second.text
    with seeded(seed, 1):
        child = child_of(first, second, variation)
    assert is_within_limits(child)
    assert (first.text, second.text) == texts
    assert to_metric(to_tree(first, variation.primitives)).text == texts[0]


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_alone_stays_within_the_limits(name):
    variation = replace(EXTENDED, crossover=0, mutation=1, mutations={name: 1})
    changed = 0
    # Hoisting changes about half of all trees, so which trees are drawn matters here.
    for seed in range(900, 1050):
        first, second = parents(seed, EXTENDED)
        with seeded(seed, 1):
            child = child_of(first, second, variation)
        assert is_within_limits(child)
        changed += child != first
    assert changed > 75


def test_child_without_crossover_and_mutation_is_the_first_parent():
    with seeded(0):
        assert child_of(FIRST, SECOND, replace(VARIATION, crossover=0, mutation=0)) == FIRST


def test_child_by_crossover_alone_is_made_of_its_parents_nodes():
    allowed = Counter(node.name for parent in (FIRST, SECOND) for node in parent.nodes())
    children = set()
    for seed in range(50):
        with seeded(seed):
            child = child_of(FIRST, SECOND, replace(VARIATION, crossover=1, mutation=0))
        assert Counter(node.name for node in child.nodes()) <= allowed
        children.add(child.text)
    assert len(children) > 5


def children_by_exchange(first: str, second: str, variation: Variation = EXTENDED) -> set[str]:
    exchange = replace(variation, crossover=1, exchange=1, mutation=0)
    children = set()
    for seed in range(300):
        with seeded(seed):
            children.add(child_of(Metric.parse(first), Metric.parse(second), exchange).text)
    return children


def test_exchange_inherits_each_factor_of_one_parent_or_not_and_those_of_both_always():
    assert children_by_exchange("quot(mul(W, G), sqrt(X))", "mul(W, sqrt(I))") == {
        "W",
        *("mul(W, G)", "quot(W, sqrt(X))", "mul(W, sqrt(I))"),
        *("quot(mul(W, G), sqrt(X))", "mul(mul(W, G), sqrt(I))"),
        *("mul(quot(W, sqrt(X)), sqrt(I))", "mul(quot(mul(W, G), sqrt(X)), sqrt(I))"),
    }


def test_exchange_tells_a_factor_from_a_divisor_and_counts_how_often_it_occurs():
    # The divisor of a divisor multiplies; of two equal factors, one is common to both.
    twice = "quot(mul(W, G), quot(D, W))"
    assert children_by_exchange(twice, "mul(W, D)") == {
        *("W", "mul(W, G)", "quot(W, D)", "mul(W, D)", "mul(W, W)"),
        *("quot(mul(W, G), D)", "mul(mul(W, G), W)", "mul(mul(W, G), D)", "mul(mul(W, W), D)"),
        *("mul(quot(W, D), W)", "mul(quot(W, D), D)", "mul(quot(mul(W, G), D), W)"),
        *("mul(quot(mul(W, G), D), D)", "mul(mul(mul(W, G), W), D)", "mul(mul(quot(W, D), W), D)"),
        "mul(mul(quot(mul(W, G), D), W), D)",
    }


def test_exchange_of_metrics_that_are_no_products_joins_them_or_takes_one():
    assert children_by_exchange("sqrt(G)", "add(W, X)") >= {
        *("sqrt(G)", "add(W, X)", "mul(sqrt(G), add(W, X))")
    }
    # A child with divisors alone is none: it is the first parent.
    assert children_by_exchange("quot(G, W)", "quot(X, W)") == {
        *("quot(G, W)", "quot(X, W)", "mul(quot(G, W), X)")
    }


def test_exchange_takes_apart_a_seed_whose_operators_are_not_in_the_set():
    assert "quot" not in VARIATION.primitives.mapping
    children = children_by_exchange("quot(W, colmean(W))", "mul(W, sqrt(X))", VARIATION)
    assert "mul(quot(W, colmean(W)), sqrt(X))" in children


def test_only_a_share_of_crossovers_exchange_factors():
    first, second = Metric.parse("mul(W, sqrt(X))"), Metric.parse("mul(G, root4(I))")
    whole = children_by_exchange(first.text, second.text)

    def count(share):
        children = []
        for seed in range(200):
            with seeded(seed):
                variation = replace(EXTENDED, crossover=1, exchange=share, mutation=0)
                children.append(child_of(first, second, variation).text)
        return sum(child in whole for child in children)

    assert count(0.0) < count(0.5) < count(1.0) == 200


def test_child_where_no_draw_is_allowed_is_the_first_parent():
    with seeded(0):
        flat = replace(VARIATION, max_depth=1, crossover=0, mutation=0)
        assert child_of(FIRST, SECOND, flat) == FIRST


def test_crossover_deeper_than_the_language_allows_is_never_read():
    chain = Metric("W")
    for _ in range(32):
        chain = Metric("tanh", (chain,))
    with seeded(0):
        for _ in range(30):
            child = child_of(chain, chain, replace(VARIATION, crossover=1))
            assert child == chain or is_within_limits(child)


def test_mutations_are_chosen_by_their_weights():
    only_node = {"node": 1.0, "subtree": 0.0, "hoist": 0.0, "insert": 0.0}
    variation = replace(VARIATION, crossover=0, mutation=1, mutations=only_node)
    for seed in range(60):
        with seeded(seed):
            child = child_of(SECOND, FIRST, variation)
        assert child.size == SECOND.size


def test_mutation_with_all_weights_zero_does_nothing():
    nothing = dict.fromkeys(MUTATIONS, 0.0)
    with seeded(0):
        child = child_of(FIRST, SECOND, replace(VARIATION, crossover=0, mutations=nothing))
    assert child == FIRST


def test_child_of_the_release_has_no_number_of_its_own():
    only = dict.fromkeys(MUTATIONS, 0.0) | {"constant": 1.0}
    for seed in range(60):
        with seeded(seed):
            assert child_of(FIRST, SECOND, replace(VARIATION, crossover=0, mutations=only)) == FIRST
        with seeded(seed, 1):
            child = child_of(FIRST, SECOND, VARIATION)
        assert not any(node.is_constant for node in child.nodes())


# Each mutation on the tree


def mutated(name: str, seed: int) -> tuple[Metric, Metric]:
    metric = parents(seed)[0]
    with seeded(seed, 2):
        return metric, to_metric(MUTATIONS[name](to_tree(metric, PRIMITIVES), PRIMITIVES))


def tunings(text: str, count: int = 60) -> set[str]:
    """Return what the constant mutation makes of a formula, over some seeds."""
    primitives, found = EXTENDED.primitives, set()
    for seed in range(count):
        with seeded(seed):
            tree = MUTATIONS["constant"](to_tree(Metric.parse(text), primitives), primitives)
        found.add(to_metric(tree).text)
    return found


def test_constant_mutation_tunes_one_number_by_the_few_factors():
    # Of 7 nodes and 2 numbers the second is in focus.
    assert tunings("add(mul(3, W), mul(0.6, G))") == {
        f"add(mul(3, W), mul({tuned}, G))" for tuned in ("0.3", "0.5", "0.72", "1.2", "-0.6")
    }


def test_constant_mutation_puts_a_factor_below_the_root_of_a_tree_without_numbers():
    places = ("mul(mul({}, W), G)", "mul(W, mul({}, G))")
    factors = ("0.5", "0.833", "1.2", "2", "-1")
    assert tunings("mul(W, G)") == {place.format(f) for place in places for f in factors}
    assert tunings("W") == {f"mul({factor}, W)" for factor in factors}


def test_constant_mutation_stays_within_the_numbers_of_the_language():
    assert tunings("mul(1e38, W)") <= {
        f"mul({x}, W)" for x in ("5e+37", "8.33e+37", "1e+38", "-1e+38")
    }
    assert tunings("add(0, W)") == {"add(0, W)"}


@pytest.mark.parametrize("seed", range(0, 90, 3))
def test_node_mutation_changes_one_node_and_no_shape(seed):
    before, after = mutated("node", seed)
    pairs = list(zip(before.nodes(), after.nodes(), strict=True))
    assert sum(one.name != other.name for one, other in pairs) <= 1
    assert [len(one.operands) for one, _ in pairs] == [len(other.operands) for _, other in pairs]


def test_hoist_mutation_never_grows_and_nearly_always_shrinks():
    sizes = [
        (before.size, after.size) for before, after in (mutated("hoist", s) for s in range(90))
    ]
    assert all(after <= before for before, after in sizes)
    # DEAP's operator leaves trees of depth 1 and roots alone.
    assert sum(after < before for before, after in sizes) > 30


def test_factor_mutation_keeps_the_tree_and_multiplies_or_divides_a_part_of_it():
    operators, whole = set(), 0
    for seed in range(200):
        before, after = mutated("factor", seed)
        names = [[node.name for node in tree.nodes()] for tree in (before, after)]
        operators |= set(names[1]) - set(names[0])
        assert not Counter(names[0]) - Counter(names[1])
        assert after.size >= before.size + 2
        whole += names[1][1 : 1 + len(names[0])] == names[0]
    assert "mul" in operators
    assert 60 < whole < 190


@pytest.mark.parametrize("name", ["extended", "release"])
def test_a_factor_is_the_worth_of_a_row_an_input_or_a_layer_or_a_relative_matrix(name):
    primitives = primitive_set(name)
    factors = []
    for seed in range(400):
        with seeded(seed):
            tree = MUTATIONS["factor"](to_tree(Metric.parse("W"), primitives), primitives)
        operator, factor = to_metric(tree), to_metric(tree).operands[1]
        assert operator.name in ("mul", "quot")
        assert factor.never_negative
        factors.append(factor)
    by_weight = [factor for factor in factors if factor.shape == MATRIX]
    assert all(re.search(r"quot\((.), (row|col)mean\(\1\)\)", f.text) for f in by_weight)
    assert bool(by_weight) == (name == "extended")
    factors = [factor for factor in factors if factor.shape != MATRIX]
    assert {factor.shape for factor in factors} == (
        {PER_INPUT, PER_OUTPUT, NUMBER} if name == "extended" else {PER_INPUT}
    )
    signed = [f.text for f in factors if "M" in f.leaves]
    assert all(re.search(r"quot\(M, [WG]\)", text) for text in signed)
    assert bool(signed) == (name == "extended")
    relative = [f for f in factors if "div(" in f.text]
    assert relative and all(f.text.count("div(") == 1 for f in relative)
    assert len({factor.text for factor in factors}) >= (150 if name == "extended" else 8)


def test_insert_mutation_never_shrinks_and_keeps_every_leaf():
    for seed in range(90):
        before, after = mutated("insert", seed)
        assert after.size > before.size
        assert Counter(n.name for n in before.nodes()) <= Counter(n.name for n in after.nodes())


def test_subtree_mutation_grows_by_a_tree_of_depth_2_at_most():
    for seed in range(90):
        before, after = mutated("subtree", seed)
        assert after.size <= before.size - 1 + 7


# Parents


def test_choose_parents_draws_two_different_members_from_the_best_of_the_pool():
    population = list(range(20))
    for seed in range(200):
        with seeded(seed):
            first, second = choose_parents(population, 1.0, 4, lambda member: -member)
        assert first != second
        assert {first, second} <= {16, 17, 18, 19}


def test_choose_parents_draws_the_pool_before_it_cuts():
    population = list(range(20))
    drawn = set()
    for seed in range(400):
        with seeded(seed):
            drawn.update(choose_parents(population, 0.25, 2, lambda member: member))
    # The two best of five: the worst three of twenty can never be among them.
    assert drawn <= set(range(17))
    assert max(drawn) > 8


def test_choose_parents_takes_a_lone_member_twice():
    assert choose_parents(("a",), 0.5, 10, str) == ("a", "a")


@pytest.mark.parametrize(("pool", "best"), [(0.01, 10), (1.0, 2)])
def test_choose_parents_works_with_two_members(pool, best):
    for seed in range(5):
        with seeded(seed):
            assert set(choose_parents(("a", "b"), pool, best, str)) == {"a", "b"}


# Units


COMPARABLE = replace(EXTENDED, comparable=True, max_size=25, max_depth=8)


def test_comparable_trees_and_children_have_no_units_and_stay_within_the_limits():
    changed = 0
    for seed in range(100):
        first, second = parents(seed, COMPARABLE)
        with seeded(seed, 1):
            child = child_of(first, second, COMPARABLE)
        assert all(metric.is_comparable for metric in (first, second, child))
        assert is_within_limits(child, COMPARABLE)
        changed += child != first
    assert changed > 50
    with_units = [parents(seed, EXTENDED)[0] for seed in range(100)]
    assert sum(metric.is_comparable for metric in with_units) < 30


def test_means_take_the_place_of_sums_and_norms():
    text = "add(div(rowsum(W), colnorm(G)), mul(colsum(rownorm(W)), colmax(G)))"
    means = "add(divrms(rowmean(W), colrms(G)), mul(colmean(rowrms(W)), colmax(G)))"
    assert with_means(Metric.parse(text)).text == means
