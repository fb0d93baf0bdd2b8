"""Products: every one that is drawn or bred is within the limits at once, whatever the settings."""

from collections import Counter
from functools import cache

import pytest

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import MATRIX, NUMBER
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding import factors
from prunevolve.search.breeding.factors import MOST, MUTATIONS, factors_for
from prunevolve.search.breeding.product import factors_of, product_of_powers
from prunevolve.search.breeding.trees import to_tree
from prunevolve.search.breeding.variation import Breeder, seeded

ALL = list(TERMINALS)
CORE = {Metric("W"): 1.0, Metric("G"): 1.0}


@cache
def products(group="model", units="required", terminals="", **changes):
    named = {"terminals": list(terminals)} if terminals else {}
    return Breeder(Search(units=units, **named, **changes), group).varied


def family(seed, made):
    """Return two parents and their child."""
    with seeded(seed):
        first, second = made.random(), made.random()
    with seeded(seed, 1):
        return first, second, made.child(first, second)


SETTINGS: dict[str, dict[str, str]] = {
    "comparable": {},
    "all terminals": {"terminals": "".join(ALL)},
    "no gradient": {"terminals": "WXV"},
    "weights alone": {"terminals": "W"},
    "row": {"group": "row"},
    "row without a gradient": {"group": "row", "terminals": "WX"},
    "layer": {"group": "layer"},
    "units off": {"units": "off"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_products_and_children_are_within_the_limits_and_parents_unchanged(settings):
    made, different = products(**settings), 0
    for seed in range(1300):
        first, second, child = family(seed, made)
        for metric in (first, second, child):
            assert metric.is_comparable or not made.comparable
            assert metric.terminals <= set(settings.get("terminals", "WGXVHM"))
            assert not metric.problem
            assert 1 <= len(factors_of(metric)) <= MOST
        different += child not in (first, second)
        if seed % 4 == 0:
            assert family(seed, made) == (first, second, child)
    assert different > 600


def test_products_whose_powers_cancel_still_rank_weights():
    relative = {Metric.parse(f"quot({x}, rowmean({x}))"): -1.0 for x in "WG"}
    assert not products()._made(CORE | relative).problem


def test_child_of_a_longer_one_loses_the_factors_of_the_least_exponents():
    trees = ["X", "V", "H", "sqr(X)", "mul(X, V)", "mul(X, H)", "mul(V, H)"]
    exponents = [0.5, 0.1, 0.4, -0.2, 0.7, -0.8, 0.6]
    free = {Metric.parse(f"divrms({x}, {x})"): e for x, e in zip(trees, exponents, strict=True)}
    long = product_of_powers((CORE | free).items())
    child = products(crossover=0.0, mutation=0.0).child(long, long)
    assert sorted(factors_of(child).values()) == [-0.8, 0.4, 0.5, 0.6, 0.7, 1, 1]


def test_random_products_differ_in_their_factors_and_are_mostly_of_a_core():
    with seeded(0):
        drawn = [factors_of(products().random()) for _ in range(400)]
    cores = [{base.text for base in one} >= {"W", "G"} for one in drawn]
    assert 0.6 < sum(cores) / 400 < 0.95
    bases = Counter(base for one in drawn for base in one)
    assert set(products().table) <= set(bases)
    assert len(bases) - len(products().table) > 40
    assert {len(one) for one in drawn} >= {1, 2, 3, 4, 5, 6}


def test_crossover_takes_a_core_what_both_have_and_half_of_what_one_has():
    made, inherited = products(), Counter()
    for seed in range(300):
        first, second, _ = map(factors_of, family(seed, made))
        with seeded(seed, 2):
            child = made._crossed(first, second)
        for base, exponent in child.items():
            assert exponent in (first.get(base), second.get(base))
        cores = [{b: x for b, x in one.items() if not b.is_comparable} for one in (first, second)]
        assert {b: x for b, x in child.items() if not b.is_comparable} in cores
        for base in {b: 0 for b in first | second if b.is_comparable}:
            inherited[(base in first) + (base in second), base in child] += 1
    assert inherited[2, True] > 50 and not inherited[2, False]
    assert 0.45 < inherited[1, True] / (inherited[1, True] + inherited[1, False]) < 0.55


PRODUCT = factors_of(
    Metric.parse("mul(mul(W, G), mul(sqrt(divrms(X, X)), quot(divrms(V, V), divrms(H, H))))")
)


def mutated(kind, seed, product=PRODUCT):
    product = dict(product)
    with seeded(seed):
        products()._mutate(product, kind)
    return product


@pytest.mark.parametrize(
    ("kind", "lengths"), [("add", {5, 6}), ("remove", {4}), ("exchange", {4, 5}), ("vary", {5})]
)
def test_mutations_change_one_factor_and_leave_the_core(kind, lengths):
    several = [mutated(kind, seed) for seed in range(60)]
    assert {len(product) for product in several} == lengths
    for product in several:
        assert product.items() >= CORE.items()
        assert sum(PRODUCT.get(base) != product.get(base) for base in PRODUCT) <= 2
    assert len({tuple(product.items()) for product in several}) >= 3


def test_vary_keeps_the_exponent_and_grows_another_tree():
    one = {Metric.parse("divrms(X, X)"): 0.37}
    several = [mutated("vary", seed, CORE | one) for seed in range(60)]
    kept = [base for product in several for base, x in product.items() if x == 0.37]
    assert len(set(kept)) > 10
    assert {base.name for base in kept} == {"divrms", "exp"}


def test_mutation_of_the_longest_exchanges_and_of_a_core_adds():
    longest = CORE | dict.fromkeys(products().table[: MOST - 2], 0.37)
    assert all(len(mutated("add", seed, longest)) <= MOST for seed in range(40))
    assert all(len(mutated(kind, 0, CORE)) == 3 for kind in MUTATIONS)


def test_mutations_come_each_as_often_as_its_weight(monkeypatch):
    kinds = Counter()
    monkeypatch.setattr(factors.Products, "_mutate", lambda self, p, kind: kinds.update([kind]))
    for seed in range(800):
        family(seed, products(crossover=0.0, mutation=1.0))
    shares = {kind: count / 800 for kind, count in kinds.items()}
    assert shares == pytest.approx({k: n / 8 for k, n in MUTATIONS.items()}, abs=0.05)


@pytest.mark.parametrize("tree", ["rowmean(X)", "div(W, 2)", "add(W, G)", "7.25"])
def test_a_tree_that_is_no_factor_is_grown_once_and_replaced_from_the_table(tree, monkeypatch):
    grown = []
    monkeypatch.setattr(factors, "GROWN", 1.0)
    monkeypatch.setattr(factors, "grown", lambda *_: grown.append(1) or Metric.parse(tree))
    for seed in range(40):
        grown.clear()
        with seeded(seed):
            metric = products().random()
        assert not any(node.text == tree for node in metric.nodes())
        assert 1 <= len(grown) <= 4


def test_a_grown_factor_is_relative_and_never_negative():
    for tree, factor in (("sqrt(X)", "divrms(sqrt(X), sqrt(X))"), ("M", "exp(divrms(M, M))")):
        tree = to_tree(Metric.parse(tree), products().primitives)
        assert products()._factor(tree).text == factor


# The table


def test_table_is_of_what_never_is_negative_and_has_no_units():
    for group in ("model", "layer", "row"):
        for factor in factors_for(ALL, group):
            assert factor.never_negative and factor.is_comparable and not factor.mistyped


def test_table_has_the_factors_of_the_terminals_that_may_be_in_it():
    texts = [factor.text for factor in factors_for("WXI", "model")]
    assert texts == ["quot(W, rowmean(W))", "quot(W, colmean(W))", "divrms(X, X)", "I"]
    assert len(factors_for(ALL, "model")) == 14
    assert factors_for("WXD", "model")[-1].text == "exp(D)"


def test_table_leaves_out_what_is_the_same_for_all_that_compete():
    left_out = {
        group: {x.text for x in factors_for(ALL, "model") if x not in factors_for(ALL, group)}
        for group in ("layer", "row")
    }
    assert left_out["layer"] == {"I", "exp(D)"}
    assert left_out["row"] == left_out["layer"] | {
        *("divrms(rowmean(mul(W, G)), mul(W, G))", "divrms(B, B)"),
        "exp(divrms(rowmean(quot(M, G)), rowmean(quot(M, G))))",
    }
    shapes = {factor.shape for factor in factors_for(ALL, "model")}
    assert {MATRIX, NUMBER} < shapes
