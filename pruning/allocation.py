"""How a sparsity is distributed over the layers: by outliers, or as a file says."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunevolve.pruning.baselines import ALLOCATIONS
from prunevolve.pruning.json_file import read_object
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.ranking import Score, count

# The layers by block and name; only their shapes are looked at.
Layers = Mapping[str, Mapping[str, nn.Linear]]


@dataclass(frozen=True)
class Allocation:
    """A rule that distributes a sparsity over the layers."""

    # Whose scores of all layers, on the dense model, the rule looks at: no block can be pruned
    # before all are scored. None for none.
    metric: Metric | None
    # Maps the layers, the function that computes a layer's scores by that metric, and the target to
    # the fraction that each layer loses, in [0, 1).
    shares: Callable[[Layers, Score, Target], Mapping[str, float]]


# As in OWL's experiments on LLaMA at 70%.
_LAMBDA = 0.08  # half the range of the fractions
_M = 5.0  # an outlier is above this many times the mean of its block's scores
_MOST = 0.99  # no layer loses more


def resolve_allocation(argument: str, target: Target) -> Allocation | None:
    """Return the allocation that an argument means; None for the same fraction of each layer.

    It is one of `ALLOCATIONS`, or a file with `shares` by layer, and the `group` and `sparsity`
    that they are for, such as the `pruning_recipe.json` of an allocated model.
    """
    if argument == "uniform":
        return None
    if target.pattern_text != "unstructured" or target.group.whole_model:
        group = f"{'group' if target.group.whole_model else 'pattern'} {target.group.name}"
        rule = f"uniform with {group}, which decides what each layer loses"
        raise ValueError(f"allocation must be {rule}; got {argument!r}")
    if argument == "owl":
        return Allocation(named_metric("wanda").metric, by_outliers)
    ways_out = f"give {', '.join(ALLOCATIONS)} or a JSON file with 'shares' by layer"
    try:
        content = read_object(Path(argument))
    except OSError as error:
        raise ValueError(f"allocation {argument!r} cannot be read: {error}; {ways_out}") from error
    shares = content.get("shares")
    if not isinstance(shares, dict) or not all(
        isinstance(share, float | int) and 0 <= share < 1 for share in shares.values()
    ):
        raise ValueError(f"allocation {argument!r} has no 'shares' in [0, 1): {ways_out}")
    wanted = {"group": target.group_name, "sparsity": target.sparsity}
    made_for = {key: content.get(key) for key in wanted}
    if made_for != wanted:
        difference = f"{json.dumps(made_for)}, not {json.dumps(wanted)}"
        raise ValueError(f"allocation {argument!r} is for {difference}")

    def of_model(layers: Layers, score: Score, target: Target) -> Mapping[str, float]:
        names = {layer for of_block in layers.values() for layer in of_block}
        if different := sorted(names ^ shares.keys()):
            where = f"{'the file' if different[0] in shares else 'the model'} has {different[0]}"
            raise ValueError(f"allocation {argument!r} is another model's: only {where}")
        return shares

    return Allocation(None, of_model)


def by_outliers(layers: Layers, score: Score, target: Target) -> dict[str, float]:
    """Return each layer's fraction by the outliers of its block.

    OWL (Yin et al., 2024, arXiv:2310.05175, Section 3.3): the share of scores above M times their
    mean is mapped linearly to the fraction that stays; the highest share keeps 2 lambda more than
    the lowest. The sparsity is the mean over all weights, not that over the blocks as in OWL.
    """
    sizes = {x: y.weight.numel() for of_block in layers.values() for x, y in of_block.items()}
    outliers: dict[str, float] = {}
    for of_block in layers.values():
        size = sum(sizes[layer] for layer in of_block)
        total = math.fsum(score(layer).sum(dtype=torch.float64).item() for layer in of_block)
        above = sum(count(score(layer) > _M * (total / size)) for layer in of_block)
        outliers |= dict.fromkeys(of_block, above / size)
    low, high = min(outliers.values()), max(outliers.values())
    scale = 2 * _LAMBDA / (high - low) if high > low else 0.0
    wanted = {layer: -scale * share for layer, share in outliers.items()}
    return rounded(shifted(wanted, sizes, target.sparsity), layers, target)


def shifted(
    wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return values all shifted by one number, within [0, 0.99]; the sparsity is their mean."""
    low, high = -max(wanted.values()), 1 - min(wanted.values())
    for _ in range(60):  # halves the interval each time
        shift = (low + high) / 2
        values = {layer: min(_MOST, max(0.0, value + shift)) for layer, value in wanted.items()}
        removed = math.fsum(sizes[layer] * value for layer, value in values.items())
        low, high = (shift, high) if removed < sparsity * sum(sizes.values()) else (low, shift)
    return values


def rounded(fractions: Mapping[str, float], layers: Layers, target: Target) -> dict[str, float]:
    """Return fractions that stand for whole numbers of weights.

    Each layer's count is rounded down, and the remainder carried on, so that the total is exact,
    but for less than one weight of each row of the last.
    """
    remainder, shares = 0.0, {}
    for of_block in layers.values():
        for layer, module in of_block.items():
            rows, columns = module.out_features, module.in_features
            size, groups = (columns, rows) if target.group.within_rows else (rows * columns, 1)
            remainder += fractions[layer] * rows * columns
            removed = min(size - 1, int(remainder / groups + 1e-9))
            remainder -= removed * groups
            share = removed / size
            # The product with the size must not fall below the number by rounding.
            shares[layer] = share if int(size * share) == removed else math.nextafter(share, 1)
    return shares
