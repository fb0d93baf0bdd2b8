"""Masks: which weights go, in each comparison group, to the last tie."""

import random
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import toy_model, toy_windows

from pruning import ranking
from pruning.masks import (
    DegenerateScores,
    Group,
    Layer,
    Model,
    NOfM,
    Row,
    Target,
    group_of,
    parse_pattern,
    select,
)
from pruning.metric import Metric
from pruning.models import linear_layers
from pruning.operators import RELEASE
from pruning.pruner import prune
from pruning.ranking import lowest_n_of_m, lowest_per_row
from pruning.recipe import Recipe
from pruning.store import ResidentStore
from pruning.walk import Texts

EXAMPLES = settings(deadline=None, max_examples=50)

# Few distinct values, both zeros, the smallest and the largest fp32: ties nearly everywhere.
TIED = st.sampled_from([-1e38, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38])
ANY_FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
FRACTIONS = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.25, 0.5, 0.999999])


@st.composite
def matrices(draw, values=TIED | ANY_FINITE):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, columns)


class Lazy(Mapping):
    """Scores made anew at each request, as those of a large model are; counts the requests."""

    def __init__(self, scores):
        self.scores = scores
        self.requests = dict.fromkeys(scores, 0)

    def __getitem__(self, name):
        self.requests[name] += 1
        return self.scores[name].clone()

    def __iter__(self):
        return iter(self.scores)

    def __len__(self):
        return len(self.scores)


def stable_lowest(values, count):
    """Mark the `count` lowest of a list by Python's stable sort."""
    gone = set(sorted(range(len(values)), key=values.__getitem__)[:count])
    return [i in gone for i in range(len(values))]


def stable_per_row(scores, count):
    return [stable_lowest(row, count) for row in scores.tolist()]


def stable_n_of_m(scores, pruned, group):
    return [
        [
            gone
            for i in range(0, len(row), group)
            for gone in stable_lowest(row[i : i + group], pruned)
        ]
        for row in scores.tolist()
    ]


def lowest_in_layer(scores, sparsity):
    return Layer().mask(scores, sparsity)


def lowest_in_model(scores, sparsity):
    return dict(select(scores.__getitem__, scores, Target(sparsity, Model())))


# Rows


def test_lowest_per_row_breaks_ties_leftmost_first():
    scores = torch.tensor([[0.3, 0.1, 0.4, 0.2], [5.0, 5.0, 1.0, 9.0]])
    mask = lowest_per_row(scores, sparsity=0.5)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]]


def test_lowest_per_row_ranks_negative_scores_below_positive_ones():
    mask = lowest_per_row(torch.tensor([[1.0, -3.0, 0.0, -2.0]]), 0.5)
    assert mask.tolist() == [[False, True, False, True]]


def test_lowest_per_row_takes_both_zeros_for_a_tie():
    mask = lowest_per_row(torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0]]), 0.5)
    assert mask.tolist() == [[True, True, False, False], [True, True, False, False]]


@pytest.mark.parametrize(
    ("sparsity", "removed"), [(0.0, 0), (0.09, 0), (0.1, 1), (0.29, 2), (0.5, 5), (0.999, 9)]
)
def test_lowest_per_row_rounds_the_count_down(sparsity, removed):
    mask = lowest_per_row(torch.rand(4, 10, generator=torch.Generator().manual_seed(0)), sparsity)
    assert mask.sum(1).tolist() == [removed] * 4


@EXAMPLES
@given(matrices(), FRACTIONS)
def test_lowest_per_row_is_a_stable_sort(scores, sparsity):
    expected = stable_per_row(scores, int(scores.shape[1] * sparsity))
    assert lowest_per_row(scores, sparsity).tolist() == expected


# Layers


def test_lowest_in_layer_lets_rows_compete():
    mask = lowest_in_layer(torch.tensor([[9.0, 8.0], [1.0, 2.0], [3.0, 7.0]]), 0.5)
    assert mask.tolist() == [[False, False], [True, True], [True, False]]


@EXAMPLES
@given(matrices(), FRACTIONS)
def test_lowest_in_layer_is_a_stable_sort_row_after_row(scores, sparsity):
    expected = stable_lowest(scores.flatten().tolist(), int(scores.numel() * sparsity))
    assert lowest_in_layer(scores, sparsity).flatten().tolist() == expected


# n:m


def test_lowest_n_of_m_ranks_inside_each_group_and_breaks_ties_leftmost_first():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 50.0, 50.0, 50.0, 50.0]])
    mask = lowest_n_of_m(scores, pruned=2, group=4)
    assert mask.int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]


@EXAMPLES
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.data())
def test_lowest_n_of_m_is_a_stable_sort_in_each_group(pruned, kept, rows, groups, data):
    group, size = pruned + kept, rows * groups * (pruned + kept)
    values = data.draw(st.lists(TIED | ANY_FINITE, min_size=size, max_size=size))
    scores = torch.tensor(values).reshape(rows, groups * group)
    expected = stable_n_of_m(scores, pruned, group)
    assert lowest_n_of_m(scores, pruned, group).tolist() == expected


@pytest.mark.parametrize(("pruned", "group"), [(0, 4), (4, 4), (-1, 4), (5, 4)])
def test_lowest_n_of_m_refuses_to_remove_none_or_all(pruned, group):
    with pytest.raises(ValueError) as caught:
        lowest_n_of_m(torch.ones(2, 8), pruned, group)
    assert str(caught.value) == f"pruned must be in [1, group), got {pruned} of {group}"


def test_lowest_n_of_m_refuses_inputs_that_the_group_does_not_divide():
    with pytest.raises(ValueError) as caught:
        lowest_n_of_m(torch.rand(2, 10), 2, 4)
    assert str(caught.value) == "in_features must be a multiple of the group length 4, got 10"


# The whole model


def test_lowest_in_model_lets_layers_compete_and_ties_go_to_the_first_layers():
    scores = {
        "a": torch.tensor([[5.0, 1.0], [2.0, 9.0]]),
        "b": torch.tensor([[2.0, 8.0, 2.0, -4.0]]),
    }
    masks = lowest_in_model(scores, 0.5)
    assert masks["a"].tolist() == [[False, True], [True, False]]
    assert masks["b"].tolist() == [[True, False, False, True]]


@EXAMPLES
@given(st.lists(matrices(), min_size=1, max_size=4), FRACTIONS)
def test_lowest_in_model_is_a_stable_sort_of_all_scores_in_a_row(layers, sparsity):
    lazy = Lazy({f"layer {i}": scores for i, scores in enumerate(layers)})
    masks = lowest_in_model(lazy, sparsity)
    everything = torch.cat([scores.flatten() for scores in layers]).tolist()
    expected = stable_lowest(everything, int(len(everything) * sparsity))
    assert torch.cat([mask.flatten() for mask in masks.values()]).tolist() == expected
    assert list(masks) == list(lazy)
    assert all(masks[name].shape == lazy.scores[name].shape for name in masks)


def test_lowest_in_model_asks_for_the_scores_of_a_layer_three_times():
    lazy = Lazy({name: torch.rand(64, 64) for name in "abcd"})
    lowest_in_model(lazy, 0.5)
    assert lazy.requests == dict.fromkeys("abcd", 3)


@EXAMPLES
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=40), FRACTIONS)
def test_lowest_in_model_is_exact_for_any_bit_pattern(patterns, sparsity):
    floats = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in patterns]
    floats = [value for value in floats if abs(value) < float("inf")] or [0.0]
    mask = lowest_in_model({"a": torch.tensor([floats], dtype=torch.float32)}, sparsity)["a"]
    assert mask[0].tolist() == stable_lowest(floats, int(len(floats) * sparsity))


def test_lowest_in_model_takes_scores_in_any_memory_layout():
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 9.0]])
    transposed = scores.t().contiguous().t()
    assert not transposed.is_contiguous()
    mask = lowest_in_model({"a": transposed}, 0.5)["a"]
    assert mask.tolist() == [[True, True, False], [False, True, False]]


def test_lowest_in_model_is_exact_with_a_sample_that_was_thinned(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that many scores equal the threshold; 10 x 64 x 96 / 251 = 245 in a whole sample.
    layers = {f"{i}": torch.randn(64, 96, generator=generator).mul(50).round() for i in range(10)}
    monkeypatch.setattr(ranking, "_SAMPLE_LIMIT", 150)
    sample, _ = ranking._sample(layers.__getitem__, dict.fromkeys(layers, 0.5))
    assert 75 <= len(sample) <= 150
    everything = torch.cat([scores.flatten() for scores in layers.values()]).tolist()
    for sparsity in (0.001, 0.5, 0.9):
        mask = torch.cat([mask.flatten() for mask in lowest_in_model(layers, sparsity).values()])
        assert mask.tolist() == stable_lowest(everything, int(len(everything) * sparsity))


@pytest.mark.parametrize(
    "mask_of", [lowest_in_layer, lambda *given: lowest_in_model({"a": given[0]}, given[1])["a"]]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_masks_are_exact_though_the_sample_misleads(mask_of, sign):
    scores = torch.arange(1.0, 25101.0)
    scores[::251] *= -1  # what is sampled of a first layer: it knows of no positive score
    scores *= sign
    assert mask_of(scores[None], 0.5)[0].tolist() == stable_lowest(scores.tolist(), 12550)


class Counted(Lazy):
    """Remembers how many of the scores that it gave were alive at each request."""

    def __init__(self, scores):
        super().__init__(scores)
        self.given, self.alive = [], []

    def __getitem__(self, name):
        self.alive.append(sum(reference() is not None for reference in self.given))
        scores = super().__getitem__(name)
        self.given.append(weakref.ref(scores))
        return scores


def test_lowest_in_model_keeps_the_scores_of_one_layer_at_a_time():
    counted = Counted({name: torch.rand(64, 64) for name in "abcdef"})
    lowest_in_model(counted, 0.5)
    assert max(counted.alive) == 1


# Scores that are refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "mask_of",
    [
        lambda scores: lowest_per_row(scores, 0.5),
        lambda scores: lowest_per_row(scores, 0.0),
        lambda scores: lowest_in_layer(scores, 0.5),
        lambda scores: lowest_n_of_m(scores, 2, 4),
        lambda scores: lowest_n_of_m(scores, 16, 32),
    ],
)
@pytest.mark.parametrize("columns", [32, 20_000])
def test_masks_refuse_scores_that_are_not_finite(mask_of, columns, bad):
    scores = torch.rand(2, columns)
    scores[1, columns - 5] = bad
    with pytest.raises(DegenerateScores) as caught:
        mask_of(scores)
    assert str(caught.value) == "scores must be finite, got a NaN or an infinity"


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lowest_in_model_names_the_layer_whose_scores_are_not_finite(bad, sparsity):
    scores = {"fine": torch.ones(2, 2), "broken": torch.tensor([[1.0, bad]])}
    with pytest.raises(DegenerateScores) as caught:
        lowest_in_model(scores, sparsity)
    assert str(caught.value) == "layer broken: scores must be finite, got a NaN or an infinity"


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    message = f"sparsity must be in [0, 1), got {sparsity}"
    calls = [
        lambda: lowest_per_row(torch.rand(2, 4), sparsity),
        lambda: lowest_in_layer(torch.rand(2, 4), sparsity),
        lambda: Target(sparsity, Row()),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


# Targets and patterns


# No n:m, or `--group 2:4` would prune by a pattern at any sparsity that was asked for.
@pytest.mark.parametrize("name", ["column", "2:4", "", None])
def test_group_of_refuses_what_is_no_group_of_unstructured_sparsity(name):
    with pytest.raises(ValueError) as caught:
        group_of(name)
    assert str(caught.value) == f"group must be one of row, layer, model, got {name!r}"


@pytest.mark.parametrize(
    ("group", "name", "pattern", "implied"),
    [
        (Row(), "row", "unstructured", None),
        (Layer(), "layer", "unstructured", None),
        (Model(), "model", "unstructured", None),
        (NOfM(1, 4), "1:4", "1:4", 0.75),
    ],
)
def test_groups_know_their_names_and_what_they_imply(group, name, pattern, implied):
    target = Target(0.75, group)
    assert (group.name, group.implied_sparsity, target.pattern_text) == (name, implied, pattern)
    assert (parse_pattern(pattern) or group_of(name)) == group
    assert target.group_name == (name if implied is None else None)
    assert group.whole_model == (name == "model")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("unstructured", None), ("2:4", NOfM(2, 4)), ("4:8", NOfM(4, 8)), ("1:3", NOfM(1, 3))],
)
def test_parse_pattern_reads(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:2", "4:4", "0:4", "-2:4", "2:4:8", "2/4", "a:b", "2:2048"]
)
def test_parse_pattern_refuses(text):
    with pytest.raises(ValueError) as caught:
        parse_pattern(text)
    assert str(caught.value) == (
        f"pattern must be unstructured or n:m with 0 < n < m <= 1024, got {text!r}"
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target(0.5, Row()), [[[1, 0, 1, 0], [1, 1, 0, 0]], [[1, 0, 1, 0]]]),
        (Target(0.5, Layer()), [[[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 0, 1, 0]]]),
        # The six lowest of the twelve are -1, 0, 1, 2 of the first layer and 3, 4 of the second.
        (Target(0.5, Model()), [[[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 0, 1, 0]]]),
        # Three of the twelve: all in the first layer.
        (Target(0.25, Model()), [[[0, 0, 0, 0], [1, 1, 1, 0]], [[0, 0, 0, 0]]]),
        (Target(0.0, NOfM(3, 4)), [[[0, 0, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0]]]),
    ],
)
def test_select_follows_the_target(target, expected):
    first = torch.tensor([[6.0, 8.0, 5.0, 7.0], [-1.0, 0.0, 1.0, 2.0]])
    second = torch.tensor([[3.0, 9.0, 4.0, 9.0]])
    selected = list(
        select({"first": first, "second": second}.__getitem__, ["first", "second"], target)
    )
    assert [name for name, _ in selected] == ["first", "second"]
    assert [mask.int().tolist() for _, mask in selected] == expected


@pytest.mark.parametrize(
    "target", [Target(0.5, Row()), Target(0.5, Layer()), Target(0, NOfM(2, 4))]
)
def test_select_looks_at_the_scores_in_advance_only_for_the_model(target):
    lazy = Lazy({"a": torch.rand(2, 4), "b": torch.rand(2, 4)})
    next(select(lazy.__getitem__, lazy, target))
    assert lazy.requests == {"a": 1, "b": 0}
    lazy = Lazy(lazy.scores)
    next(select(lazy.__getitem__, lazy, Target(0.5, Model())))
    assert lazy.requests == {"a": 3, "b": 2}


def test_select_removes_of_each_layer_the_fraction_that_it_is_given():
    scores = {"a": torch.tensor([[4.0, 3.0, 2.0, 1.0]]), "b": torch.tensor([[5.0, 6.0, 7.0, 8.0]])}
    fractions = {"a": 0.25, "b": 0.75}
    for group in (Row(), Layer()):
        masks = dict(group.select(scores.__getitem__, fractions))
        assert masks["a"].int().tolist() == [[0, 0, 0, 1]]
        assert masks["b"].int().tolist() == [[1, 1, 1, 0]]
    pairs = dict(NOfM(1, 2).select(scores.__getitem__, fractions))
    assert [mask.int().tolist() for mask in pairs.values()] == [[[0, 1, 0, 1]], [[1, 0, 1, 0]]]


def test_select_in_the_model_takes_the_mean_of_the_fractions_by_size():
    scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])}
    # 0.5 * 2 + 0.25 * 6 = 2.5: two go. The plain mean of 0.375 would be three of eight.
    masks = dict(Model().select(scores.__getitem__, {"a": 0.5, "b": 0.25}))
    assert [int(mask.sum()) for mask in masks.values()] == [2, 0]


# A group of our own


@dataclass(frozen=True)
class Column(Group):
    """Each input column on its own."""

    name = "column"

    def mask(self, scores, fraction):
        return lowest_per_row(scores.t().contiguous(), fraction).t()

    def owes(self, weight_zeros, fraction):
        return Row().owes(weight_zeros.t(), fraction)


@pytest.mark.parametrize("propagation", ["one-shot", "sequential"])
def test_new_group_is_one_class(propagation):
    model, target = toy_model("llama"), Target(0.5, Column())
    dense = {name: layer.weight.abs() for name, layer in linear_layers(model).items()}
    recipe = Recipe(Metric("W"), target, propagation)
    prune(ResidentStore(model), recipe, Texts(toy_windows()))
    assert (target.group_name, target.pattern_text) == ("column", "unstructured")
    for name, layer in linear_layers(model).items():
        half = len(layer.weight) // 2
        for before, after in zip(dense[name].t().tolist(), layer.weight.t() == 0, strict=True):
            assert after.tolist() == stable_lowest(before, half), name
        assert target.group.owes(layer.weight == 0, 0.5)
        assert not target.group.owes(layer.weight == 0, 0.75)


# Large matrices


def large(kind, rows=60, columns=1536):
    """Return scores of a matrix as large as they come, with what makes counting hard."""
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).abs()
    return {
        "smooth": scores,
        "signed": scores * torch.tensor([1.0, -1.0]).repeat(columns // 2),
        "wide": (scores * 15).exp(),
        "rounded": (scores * 200).round() / 200,
        "few values": (scores * 2).round(),
        "zeros of both signs": torch.where(scores < 0.9, scores.sign() * 0.0, scores).mul(-1),
        "one row constant": torch.where(torch.arange(rows)[:, None] == 7, 1.0, scores),
        "sorted columns": scores.sort(1).values,
        "far apart": torch.where(scores < 0.6, -3e38, torch.where(scores < 0.7, 3e38, scores)),
    }[kind]


KINDS = ("smooth", "signed", "wide", "rounded", "few values", "zeros of both signs")
KINDS += ("one row constant", "sorted columns", "far apart")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.7, 0.999])
def test_thresholds_are_those_of_a_stable_sort(kind, sparsity):
    scores = large(kind)
    order = scores.sort(dim=1, stable=True).indices[:, : int(1536 * sparsity)]
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(lowest_per_row(scores, sparsity), expected)
    order = scores.flatten().sort(stable=True).indices[: int(scores.numel() * sparsity)]
    expected = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(lowest_in_layer(scores, sparsity).flatten(), expected)


@pytest.mark.parametrize("columns", [1540, 4096, 1537])
def test_rows_of_any_width_lose_their_share(columns):
    scores = torch.rand(5, columns, generator=torch.Generator().manual_seed(1))
    assert (lowest_per_row(scores, 0.6).sum(1) == int(columns * 0.6)).all()


@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (1, 3), (5, 8), (100, 192)])
def test_n_of_m_of_a_large_matrix_is_that_of_a_stable_sort(pruned, group):
    scores = large("rounded", rows=200)
    groups = scores.reshape(-1, group)
    order = groups.sort(dim=1, stable=True).indices[:, :pruned]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(lowest_n_of_m(scores, pruned, group), expected.reshape(scores.shape))


# Any formula of the release, from statistics to masks


def random_metric(generator, depth):
    if depth == 0 or generator.random() < 0.2:
        return Metric(generator.choice("WGX"))
    name = generator.choice(sorted(RELEASE))
    arity = RELEASE[name].arity
    return Metric(name, tuple(random_metric(generator, depth - 1) for _ in range(arity)))


def finite_scores(count):
    """Yield texts and scores of random formulas that rank weights and stay finite."""
    generator = random.Random(7)
    random_numbers = torch.Generator().manual_seed(7)
    while count:
        # Rounded, so that ties are frequent.
        W = torch.randn(6, 16, generator=random_numbers).abs().mul(4).round().div(4)
        G = torch.rand(6, 16, generator=random_numbers).mul(8).round()
        X = torch.rand(1, 16, generator=random_numbers).mul(4).round()
        metric = random_metric(generator, 4)
        scores = metric.score(W=W, G=G, X=X)
        if metric.shape.by_row and torch.isfinite(scores).all():
            count -= 1
            yield metric.text, scores


def test_masks_of_random_formulas_match_a_stable_sort():
    for text, scores in finite_scores(80):
        assert lowest_per_row(scores, 0.5).tolist() == stable_per_row(scores, 8), text
        assert lowest_n_of_m(scores, 2, 4).tolist() == stable_n_of_m(scores, 2, 4), text
