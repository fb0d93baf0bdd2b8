"""Masks: which weights go, in each comparison group, to the last tie."""

import weakref
from collections import Counter

import pytest
import torch
from far_device import far_device
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from prunevolve.pruning import ranking
from prunevolve.pruning.masks import Layer, Model, NOfM, Row, Target, pattern_group

EXAMPLES = settings(deadline=None, max_examples=50)
FAR = far_device()

# Few distinct values, both zeros, the smallest and the largest fp32: ties nearly everywhere.
TIED = st.sampled_from([-1e38, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.4e38])
SCORES = TIED | st.floats(width=32, allow_nan=False, allow_infinity=False)
FRACTIONS = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.25, 0.5, 0.999999])
LENGTHS = st.sampled_from([1, 2, 5, 16, 24])
"""Of rows: loops are compiled for each of the short ones."""


@st.composite
def matrices(draw, lengths=LENGTHS):
    rows, columns = draw(st.integers(1, 4)), draw(lengths)
    flat = draw(st.lists(SCORES, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, columns)


def sorted_rows(scores, removed):
    """Mark the lowest scores of each row by torch's stable sort, as on a GPU."""
    return ranking.lowest_of_rows(scores.to(FAR), removed).cpu()


def stable_lowest(values, count):
    """Mark the `count` lowest of a list by Python's stable sort."""
    gone = set(sorted(range(len(values)), key=values.__getitem__)[:count])
    return [i in gone for i in range(len(values))]


def lowest_in_model(scores, sparsity):
    return dict(Model().select(scores.__getitem__, dict.fromkeys(scores, sparsity)))


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).tolist()


@EXAMPLES
@given(matrices(), FRACTIONS)
def test_masks_of_rows_n_of_m_and_a_layer_are_a_stable_sort(scores, sparsity):
    columns = scores.shape[1]
    removed = int(columns * sparsity)
    expected = [stable_lowest(row, removed) for row in scores.tolist()]
    assert Row().mask(scores, sparsity).tolist() == expected
    if removed:
        mask = NOfM(columns - removed, columns).mask(scores.repeat(1, 2), sparsity)
        assert mask.tolist() == [2 * row for row in expected]
    expected = stable_lowest(scores.flatten().tolist(), int(scores.numel() * sparsity))
    assert Layer().mask(scores, sparsity).flatten().tolist() == expected


@EXAMPLES
@given(st.lists(matrices(st.integers(1, 8)), min_size=1, max_size=4), FRACTIONS)
def test_masks_in_the_model_are_a_stable_sort_of_all_scores_in_a_row(layers, sparsity):
    layers = {f"layer {i}": scores for i, scores in enumerate(layers)}
    masks = lowest_in_model(layers, sparsity)
    everything = flat(layers.values())
    assert flat(masks.values()) == stable_lowest(everything, int(len(everything) * sparsity))
    assert [mask.shape for mask in masks.values()] == [layer.shape for layer in layers.values()]


@EXAMPLES
@given(matrices(), FRACTIONS, SCORES, SCORES, st.integers(0, 9))
def test_torch_elsewhere_does_what_compiled_loops_do(scores, sparsity, low, high, ties):
    removed, turned = int(scores.shape[1] * sparsity), scores.T.contiguous().T
    assert torch.equal(sorted_rows(scores, removed), ranking.lowest_of_rows(turned, removed))
    number, inside = ranking.strictly_between(scores.to(FAR), low, high)
    compiled_number, compiled_inside = ranking.strictly_between(turned, low, high)
    assert (number, inside.tolist()) == (compiled_number, compiled_inside.tolist())
    for threshold in (low, float(scores[0, 0])):
        mask, left = ranking.up_to(scores.to(FAR), threshold, ties)
        compiled_mask, compiled_left = ranking.up_to(turned, threshold, ties)
        assert torch.equal(mask.cpu(), compiled_mask) and left == compiled_left


def test_masks_in_the_model_are_exact_with_a_sample_that_was_thinned(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that many scores equal the threshold; 10 x 64 x 96 / 251 = 245 in a whole sample.
    layers = {f"{i}": torch.randn(64, 96, generator=generator).mul(50).round() for i in range(10)}
    monkeypatch.setattr(ranking, "_SAMPLE_LIMIT", 150)
    sample, _ = ranking._sample(layers.__getitem__, dict.fromkeys(layers, 0.5))
    assert 75 <= len(sample) - 2 <= 150
    everything = flat(layers.values())
    masks = lowest_in_model(layers, 0.5)
    assert flat(masks.values()) == stable_lowest(everything, len(everything) // 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_masks_are_exact_though_the_sample_misleads(sign):
    scores = torch.arange(1.0, 25101.0)
    scores[::251] *= -1  # what is sampled of a first layer: it knows of no positive score
    scores *= sign
    masks = lowest_in_model({"a": scores[None]}, 0.5)
    assert flat(masks.values()) == stable_lowest(scores.tolist(), 12550)


def large(kind, columns):
    """Return scores of a matrix as large as they come, with what makes counting hard."""
    scores = torch.randn(60, columns, generator=torch.Generator().manual_seed(0))
    return {
        "wide": (scores * 15).exp(),
        "few values": (scores * 2).round(),
        "one row constant": torch.where(torch.arange(60)[:, None] == 7, 1.0, scores),
        "far apart": torch.where(scores < 0, -3e38, torch.where(scores < 0.5, 3e38, scores)),
    }[kind]


@pytest.mark.parametrize("kind", ["wide", "few values", "one row constant", "far apart"])
@pytest.mark.parametrize(("sparsity", "columns"), [(0.01, 20_000), (0.5, 1537), (0.999, 20_000)])
def test_masks_of_a_large_matrix_are_those_of_a_stable_sort(kind, sparsity, columns):
    scores = large(kind, columns)  # above a million scores, a layer's threshold is searched
    expected = sorted_rows(scores, int(columns * sparsity))
    assert torch.equal(Row().mask(scores, sparsity), expected)
    expected = sorted_rows(scores.reshape(1, -1), int(scores.numel() * sparsity))
    assert torch.equal(Layer().mask(scores, sparsity).reshape(1, -1), expected)


def test_select_asks_for_scores_when_a_mask_is_due_and_in_the_model_twice_at_the_call():
    requests, given = Counter(), []

    def score(name):
        assert sum(reference() is not None for reference in given) <= 1
        requests[name] += 1
        scores = torch.rand(64, 64)
        given.append(weakref.ref(scores))
        return scores

    fractions = dict.fromkeys("abcdef", 0.5)
    masks = Model().select(score, fractions)
    assert requests == dict.fromkeys("abcdef", 2)
    next(masks)
    assert requests == dict.fromkeys("bcdef", 2) | {"a": 3}
    dict(masks)
    assert list(Model().select(score, {})) == []
    next(Row().select(score, fractions))
    assert requests == dict.fromkeys("bcdef", 3) | {"a": 4}


@pytest.mark.parametrize("sparsity", [-0.1, 1])
def test_sparsity_outside_its_range_is_refused(sparsity):
    assert refusal(Target, sparsity, Row()) == f"sparsity must be in [0, 1), got {sparsity}"


@pytest.mark.parametrize("text", ["", "2:", "4:4", "0:4", "2:4:8", "2:2048"])
def test_text_that_is_no_pattern_is_refused(text):
    rule = "unstructured, neurons, or n:m with 0 < n < m <= 1024"
    assert refusal(pattern_group, text, None) == f"pattern must be {rule}, got {text!r}"
