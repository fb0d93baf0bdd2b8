"""Allocation of a sparsity over layers: by outliers, or by a file."""

import json

import pytest
import torch
from refusals import refusal
from torch.nn import Linear

from prunevolve.pruning.allocation import by_outliers, resolve_allocation, rounded
from prunevolve.pruning.masks import Layer, Row, Target

LAYERS = {
    "block.0": {"a": Linear(16, 8), "b": Linear(32, 4)},
    "block.1": {"c": Linear(16, 8), "d": Linear(100, 2)},
}
SIZES = {x: y.weight.numel() for of_block in LAYERS.values() for x, y in of_block.items()}


@pytest.mark.parametrize("group", [Row(), Layer()])
def test_owl_keeps_more_of_the_block_with_more_outliers(group):
    outliers = {"a": 1, "b": 2, "c": 6, "d": 1}

    def score(layer):
        return torch.where(torch.arange(SIZES[layer]) < outliers[layer], 1000.0, 1.0)

    fractions = by_outliers(LAYERS, score, Target(0.6, group))
    # 3 of 256 scores are outliers in the first block and 7 of 328 in the second: the ends of a
    # range of 0.16. The shift makes the mean over all weights the sparsity.
    first = 0.6 + 0.16 * 328 / (256 + 328)
    expected = {"a": first, "b": first, "c": first - 0.16, "d": first - 0.16}
    finest = 1 / 16
    assert fractions == pytest.approx(expected, abs=finest)


@pytest.mark.parametrize(("group", "unit"), [(Row(), 2), (Layer(), 1)])
@pytest.mark.parametrize("sparsity", [0.123, 0.29, 0.5, 0.777])
def test_rounded_counts_add_up_to_the_sparsity_within_the_last_layers_unit(group, unit, sparsity):
    fractions = rounded(dict.fromkeys(SIZES, sparsity), LAYERS, Target(sparsity, group))
    removed = 0
    for of_block in LAYERS.values():
        for name, layer in of_block.items():
            scores = torch.rand(layer.weight.shape)
            removed += int(group.mask(scores, fractions[name]).sum())
    assert 0 <= sparsity * sum(SIZES.values()) - removed < unit


def written(path, **content):
    path.write_text(json.dumps({"group": "row", "sparsity": 0.5, **content}), encoding="utf-8")
    return str(path)


def test_file_gives_the_shares_that_it_has_to_the_model_that_it_is_for(tmp_path):
    shares = {"a": 0.25, "b": 0.5, "c": 0.75, "d": 0.5}
    target = Target(0.5, Row())
    allocation = resolve_allocation(written(tmp_path / "shares.json", shares=shares), target)
    assert allocation.metric is None
    assert allocation.shares(LAYERS, None, target) == shares
    with pytest.raises(ValueError, match="another model's: only the file has c"):
        allocation.shares({"block.0": LAYERS["block.0"]}, None, target)


@pytest.mark.parametrize(
    ("shares", "group", "problem"),
    [
        ({"a": 0.5}, Layer(), 'is for {"group": "row", "sparsity": 0.5}, not'),
        (None, Row(), "has no 'shares' in [0, 1)"),
        ({"a": 1.0}, Row(), "has no 'shares' in [0, 1)"),
    ],
)
def test_file_for_another_target_or_without_fitting_shares_is_refused(
    tmp_path, shares, group, problem
):
    file = written(tmp_path / "shares.json", shares=shares)
    assert problem in refusal(resolve_allocation, file, Target(0.5, group))
