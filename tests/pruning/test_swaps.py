"""Swaps: masks with a lower error and as many zeros in every row or group."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunevolve.pruning.masks import NOfM, Row
from prunevolve.pruning.swaps import refine


def layer(seed, rows=6, columns=24):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(100, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def errors_of(weight, mask, gram):
    removed = (weight * mask).double()
    return ((removed @ gram.double()) * removed).sum(1)


def best_swap(weight, gone, gram, length):
    """Return the lowest error of a row after one swap, by trying all."""
    errors = []
    for u in torch.nonzero(gone).flatten().tolist():
        start = u // length * length
        for p in range(start, min(start + length, len(gone))):
            if not gone[p]:
                swapped = gone.clone()
                swapped[u], swapped[p] = False, True
                errors.append(float(errors_of(weight[None], swapped[None], gram)))
    return min(errors)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 999), st.sampled_from([None, 4, 5]))
def test_one_swap_is_the_best_there_is(seed, length):
    weight, gram = layer(seed, rows=2)
    mask = Row().mask(weight.abs(), 0.5)
    after = errors_of(weight, refine(weight, mask, gram, length, most=1), gram)
    for row, error in enumerate(after.tolist()):
        before = float(errors_of(weight, mask, gram)[row])
        expected = min(before, best_swap(weight[row], mask[row], gram, length or len(gram)))
        assert error == pytest.approx(expected, rel=1e-4)


def test_error_of_each_row_falls_with_every_swap_until_none_helps():
    weight, gram = layer(1)
    mask = Row().mask(weight.abs(), 0.5)
    errors = [errors_of(weight, refine(weight, mask, gram, most=most), gram) for most in range(60)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()
    assert torch.equal(errors[-1], errors[-2])
    assert errors[-1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize(("group", "length"), [(Row(), None), (NOfM(2, 4), 4)])
def test_rows_and_groups_keep_their_counts_and_the_given_mask_stays(group, length):
    weight, gram = layer(2)
    mask = group.mask(weight.abs(), 0.3)
    before = mask.clone()
    refined = refine(weight.bfloat16(), mask, gram, length)
    assert torch.equal(mask, before)
    size = length or weight.shape[1]
    assert torch.equal(refined.reshape(-1, size).sum(1), mask.reshape(-1, size).sum(1))
    assert errors_of(weight, refined, gram).sum() < errors_of(weight, mask, gram).sum()
