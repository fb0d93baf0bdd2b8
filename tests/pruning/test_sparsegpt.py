"""SparseGPT: the update of what stays, and its own choice of what goes."""

import pytest
import torch

from prunevolve.pruning.masks import NOfM
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.pruning.sparsegpt import compensate
from prunevolve.pruning.statistics import DAMPING


def layer(rows=24, columns=40):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(300, columns, generator=generator) @ mixed
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 5


def step_by_step(weight, gram, removal, Bs):
    """Remove weights from left to right, each time with the best change of those to the right.

    In fp64, with the inverse of what is left of the damped matrix computed anew at each column. If
    a fraction is to go, then of each `Bs` columns what costs least after all changes so far.
    """
    weight, damped = weight.double().clone(), gram.double().clone()
    damped.diagonal().add_(DAMPING * gram.double().diagonal().mean())
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(len(gram))]
    mask = removal if isinstance(removal, torch.Tensor) else torch.zeros(weight.shape).bool()
    for j, inverse in enumerate(inverses):
        if mask is not removal and j % Bs == 0:
            cost = weight[:, j : j + Bs] ** 2 / torch.stack([x[0, 0] for x in inverses[j : j + Bs]])
            highest = cost.flatten().kthvalue(int(cost.numel() * removal)).values
            mask[:, j : j + Bs] = cost <= highest
        for row in torch.nonzero(mask[:, j]).flatten():
            weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
            weight[row, j] = 0
    return weight


@pytest.mark.parametrize("Bs", [1, 7, 16, 128])
@pytest.mark.parametrize("chooses", [False, True])
def test_update_equals_the_removal_of_one_weight_after_the_other(Bs, chooses):
    weight, gram = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    removal = 0.5 if chooses else mask
    solved, _ = compensate(weight, removal, gram.clone(), Bs=Bs)
    expected = step_by_step(weight, gram, removal, Bs)
    torch.testing.assert_close(solved.double(), expected, atol=1e-4, rtol=0)
    assert torch.equal(solved == 0, expected == 0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 0.5, 0.99])
def test_own_choice_removes_exactly_the_fraction_and_writes_to_nothing_given(fraction):
    weight, gram = layer(columns=300)
    before = weight.clone(), gram.clone()
    solved, _ = compensate(weight, fraction, gram)
    assert int((solved == 0).sum()) == int(weight.numel() * fraction)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


@pytest.mark.parametrize(("kept", "length"), [(2, 4), (4, 8), (1, 3), (100, 200)])
def test_own_choice_under_n_of_m_leaves_n_of_each_m(kept, length):
    weight, gram = layer(columns=600)
    solved, _ = compensate(weight, 0.5, gram, NOfM(kept, length))
    zeros = (solved.reshape(-1, length) == 0).sum(1)
    assert set(zeros.tolist()) == {length - kept}


def test_inputs_that_are_always_zero_do_no_harm():
    weight, gram = layer()
    gram[3], gram[:, 3] = 0, 0
    solved, grown = compensate(weight, 0.5, gram)
    assert torch.isfinite(solved).all() and grown == 0


def test_weight_that_is_not_finite_is_not_ranked():
    weight, gram = layer()
    weight[3, 5] = torch.nan
    with pytest.raises(DegenerateScores, match="scores must be finite"):
        compensate(weight, 0.5, gram)
