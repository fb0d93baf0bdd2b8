"""Trees obey their limits, leave parents alone, and are the same from the same key."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from prunevolve.configs.schema import MAX_TREE_DEPTH, Search
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.operators import SETS
from prunevolve.pruning.statistics import TERMINAL_SETS
from prunevolve.search.breeding.trees import Trees, grown, primitive_set, to_tree
from prunevolve.search.breeding.variation import seeded

SEARCH = Search(initial_depth=(1, 3), max_size=13, primitives="release")
RELEASE, EXTENDED = (primitive_set(name, TERMINAL_SETS[name]) for name in SETS)
TREES = Trees(SEARCH, RELEASE, comparable=False)
COMPARABLE = replace(TREES, comparable=True)
FIRST = Metric.parse("mul(W, sqrt(X))")
SECOND = Metric.parse("add(mms(G), neg(log(W)))")


def changed(trees, **changes):
    return replace(trees, search=trees.search.model_copy(update=changes))


def drawn(seed, trees=TREES):
    with seeded(seed):
        return trees.random()


def children(trees, count, first=FIRST, second=SECOND):
    bred = []
    for seed in range(count):
        with seeded(seed):
            bred.append(trees.child(first, second))
    return bred


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_tree_gives_its_metric_back_node_for_node(seed):
    # Also from the tree of a set that its operators, terminals and numbers are not drawn from.
    powers = Metric.parse("mul(power(W, 1.3), sqr(power(X, 0.2)))")
    for metric in (drawn(seed), drawn(seed, COMPARABLE), powers):
        for primitives in (RELEASE, EXTENDED):
            tree = to_tree(metric, primitives)
            assert grown(tree, comparable=False) == metric
            assert (len(tree), tree.height) == (len([*metric.nodes()]), metric.depth)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([TREES, COMPARABLE]))
def test_random_metrics_and_children_are_within_the_limits(seed, trees):
    first, second = drawn(seed, trees), drawn(seed + 1, trees)
    texts = first.text, second.text
    with seeded(seed, 1):
        child = trees.child(first, second)
    for metric in (first, second, child):
        assert metric.size <= trees.search.max_size and metric.depth <= MAX_TREE_DEPTH
        assert not metric.problem
        assert metric.is_comparable or not trees.comparable
    assert first.depth <= 3
    assert (first.text, second.text) == texts


def test_child_by_crossover_alone_is_made_of_its_parents_nodes():
    allowed = Counter(node.name for parent in (FIRST, SECOND) for node in parent.nodes())
    bred = children(changed(TREES, crossover=1, mutation=0), 50)
    assert all(Counter(node.name for node in child.nodes()) <= allowed for child in bred)
    assert len(set(bred)) > 5
    # Without variation it is the first parent.
    assert set(children(changed(TREES, crossover=0, mutation=0), 3)) == {FIRST}


def test_child_by_mutation_alone_differs_in_one_node():
    for child in children(changed(TREES, crossover=0, mutation=1), 50):
        pairs = zip(child.nodes(), FIRST.nodes(), strict=True)
        assert sum(one.name != other.name for one, other in pairs) == 1
