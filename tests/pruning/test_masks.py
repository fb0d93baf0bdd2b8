"""Masks: which weights go, in each comparison group, to the last tie."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from prunevolve.pruning import ranking
from prunevolve.pruning.masks import (
    DegenerateScores,
    Layer,
    Model,
    NOfM,
    Row,
    Target,
    group_of,
    parse_pattern,
)
from prunevolve.pruning.ranking import lowest_n_of_m, lowest_per_row

EXAMPLES = settings(deadline=None, max_examples=50)

# Few distinct values, both zeros, the smallest and the largest fp32: ties nearly everywhere.
TIED = st.sampled_from([-1e38, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38])
SCORES = TIED | st.floats(width=32, allow_nan=False, allow_infinity=False)
FRACTIONS = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.25, 0.5, 0.999999])


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    flat = draw(st.lists(SCORES, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, columns)


class Lazy(dict):
    """Scores made anew at each request; counts requests, and those still alive at each."""

    def __init__(self, scores):
        super().__init__(scores)
        self.requests = dict.fromkeys(scores, 0)
        self.given, self.alive = [], []

    def __getitem__(self, name):
        self.alive.append(sum(reference() is not None for reference in self.given))
        self.requests[name] += 1
        scores = super().__getitem__(name).clone()
        self.given.append(weakref.ref(scores))
        return scores


def stable_lowest(values, count):
    """Mark the `count` lowest of a list by Python's stable sort."""
    gone = set(sorted(range(len(values)), key=values.__getitem__)[:count])
    return [i in gone for i in range(len(values))]


def lowest_in_layer(scores, sparsity):
    return Layer().mask(scores, sparsity)


def lowest_in_model(scores, sparsity):
    return dict(Model().select(scores.__getitem__, dict.fromkeys(scores, sparsity)))


@EXAMPLES
@given(matrices(), FRACTIONS)
def test_lowest_per_row_and_in_layer_are_a_stable_sort(scores, sparsity):
    removed = int(scores.shape[1] * sparsity)
    expected = [stable_lowest(row, removed) for row in scores.tolist()]
    assert lowest_per_row(scores, sparsity).tolist() == expected
    expected = stable_lowest(scores.flatten().tolist(), int(scores.numel() * sparsity))
    assert lowest_in_layer(scores, sparsity).flatten().tolist() == expected


@EXAMPLES
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.data())
def test_lowest_n_of_m_is_a_stable_sort_in_each_group(pruned, kept, rows, groups, data):
    group, size = pruned + kept, rows * groups * (pruned + kept)
    values = data.draw(st.lists(SCORES, min_size=size, max_size=size))
    mask = lowest_n_of_m(torch.tensor(values).reshape(rows, groups * group), pruned, group)
    each = torch.tensor(values).reshape(-1, group).tolist()
    expected = [stable_lowest(some, pruned) for some in each]
    assert mask.reshape(-1, group).tolist() == expected


@EXAMPLES
@given(st.lists(matrices(), min_size=1, max_size=4), FRACTIONS)
def test_lowest_in_model_is_a_stable_sort_of_all_scores_in_a_row(layers, sparsity):
    lazy = Lazy({f"layer {i}": scores for i, scores in enumerate(layers)})
    masks = lowest_in_model(lazy, sparsity)
    everything = torch.cat([scores.flatten() for scores in layers]).tolist()
    expected = stable_lowest(everything, int(len(everything) * sparsity))
    assert torch.cat([mask.flatten() for mask in masks.values()]).tolist() == expected
    assert list(masks) == list(lazy)
    assert all(masks[name].shape == lazy.get(name).shape for name in masks)


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


def large(kind, rows=60, columns=1536):
    """Return scores of a matrix as large as they come, with what makes counting hard."""
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).abs()
    return {
        "smooth": scores,
        "signed": scores * torch.where(torch.arange(columns) % 2 == 0, 1.0, -1.0),
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


@pytest.mark.parametrize("columns", [1536, 1537])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.7, 0.999])
def test_masks_of_a_large_matrix_are_those_of_a_stable_sort(kind, sparsity, columns):
    scores = large(kind, columns=columns)
    order = scores.sort(dim=1, stable=True).indices[:, : int(columns * sparsity)]
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(lowest_per_row(scores, sparsity), expected)
    order = scores.flatten().sort(stable=True).indices[: int(scores.numel() * sparsity)]
    expected = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order, True)
    assert torch.equal(lowest_in_layer(scores, sparsity).flatten(), expected)


@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (1, 3), (5, 8), (100, 192)])
def test_n_of_m_of_a_large_matrix_is_that_of_a_stable_sort(pruned, group):
    scores = large("rounded", rows=200)
    groups = scores.reshape(-1, group)
    order = groups.sort(dim=1, stable=True).indices[:, :pruned]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter(1, order, True)
    assert torch.equal(lowest_n_of_m(scores, pruned, group), expected.reshape(scores.shape))


def test_select_in_the_model_takes_the_mean_of_the_fractions_by_size():
    scores = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])}
    # 0.5 * 2 + 0.25 * 6 = 2.5: two go. The plain mean of 0.375 would be three of eight.
    masks = dict(Model().select(scores.__getitem__, {"a": 0.5, "b": 0.25}))
    assert [int(mask.sum()) for mask in masks.values()] == [2, 0]


def test_lowest_in_model_keeps_the_scores_of_one_layer_and_asks_three_times():
    lazy = Lazy({name: torch.rand(64, 64) for name in "abcdef"})
    lowest_in_model(lazy, 0.5)
    assert max(lazy.alive) == 1
    assert lazy.requests == dict.fromkeys("abcdef", 3)


@pytest.mark.parametrize(
    "target", [Target(0.5, Row()), Target(0.5, Layer()), Target(0, NOfM(2, 4))]
)
def test_select_of_other_groups_asks_for_scores_when_a_mask_is_due(target):
    lazy = Lazy({"a": torch.rand(2, 4), "b": torch.rand(2, 4)})
    next(target.group.select(lazy.__getitem__, dict.fromkeys("ab", target.sparsity)))
    assert lazy.requests == {"a": 1, "b": 0}


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
    message = refusal(mask_of, scores, error=DegenerateScores)
    assert message == "scores must be finite, got a NaN or an infinity"


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lowest_in_model_names_the_layer_whose_scores_are_not_finite(bad, sparsity):
    scores = {"fine": torch.ones(2, 2), "broken": torch.tensor([[1.0, bad]])}
    message = refusal(lowest_in_model, scores, sparsity, error=DegenerateScores)
    assert message == "layer broken: scores must be finite, got a NaN or an infinity"


DIVISOR = "in_features must be a multiple of the group length"
N_OF_M = "pruned must be in [1, group), got"
GROUP = "group must be one of row, layer, model, got"


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan")])
def test_sparsity_outside_its_range_is_refused(sparsity):
    calls = [
        lambda: lowest_per_row(torch.rand(2, 4), sparsity),
        lambda: lowest_in_layer(torch.rand(2, 4), sparsity),
        lambda: Target(sparsity, Row()),
    ]
    for call in calls:
        assert refusal(call) == f"sparsity must be in [0, 1), got {sparsity}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowest_n_of_m(torch.ones(2, 8), 0, 4), f"{N_OF_M} 0 of 4"),
        (lambda: lowest_n_of_m(torch.ones(2, 8), 4, 4), f"{N_OF_M} 4 of 4"),
        (lambda: lowest_n_of_m(torch.ones(2, 8), 2, 3), f"{DIVISOR} 3, got 8"),
        (lambda: group_of("column"), f"{GROUP} 'column'"),
        # Else `--group 2:4` would prune by a pattern at any sparsity that was asked for.
        (lambda: group_of("2:4"), f"{GROUP} '2:4'"),
    ],
)
def test_group_that_does_not_fit_is_refused(call, message):
    assert refusal(call) == message


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "4:4", "0:4", "-2:4", "2:4:8", "2:2048"])
def test_parse_pattern_refuses(text):
    assert refusal(parse_pattern, text) == (
        f"pattern must be unstructured or n:m with 0 < n < m <= 1024, got {text!r}"
    )
