"""How a sparsity is distributed over the layers: by outliers, or as a file says."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from prunevolve.pruning.baselines import ALLOCATIONS, NAMED
from prunevolve.pruning.json_file import read_object
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.ranking import Score, count

Shapes = Mapping[str, Mapping[str, tuple[int, int]]]
"""(out_features, in_features) of each layer, by block and layer."""


@dataclass(frozen=True)
class Allocation:
    """A rule that distributes a sparsity over the layers.

    Attributes:
        metric: The metric whose scores, on the dense model, the rule looks at; None for none. It
            then gets those of all layers, and no block can be pruned before all are scored.
        shares: Maps the layers' shapes, the function that computes a layer's scores by that metric,
            and the target to the fraction that each layer loses, in [0, 1).
    """

    metric: Metric | None
    shares: Callable[[Shapes, Score, Target], Mapping[str, float]]


_OWL_RANGE = 0.08
"""Half the range of the fractions: lambda in OWL's experiments on LLaMA at 70%."""

_OUTLIER_FACTOR = 5.0
"""An outlier is above this many times the mean of its block's scores: M in OWL's experiments."""

_MOST = 0.99
"""No layer loses more."""


def resolve_allocation(argument: str, target: Target) -> Allocation | None:
    """Return the allocation that an argument means; None for the same fraction of each layer.

    Args:
        argument: One of `ALLOCATIONS`, or a file with `shares` by layer, and the `group` and
            `sparsity` that they are for, such as the `pruning_recipe.json` of an allocated model.

    Raises:
        ValueError: If it is neither, or does not go with the target; one line.
    """
    if argument == "uniform":
        return None
    if target.group_name is None:
        raise ValueError(
            f"allocation must be uniform with pattern {target.pattern_text}, which takes the same "
            f"of every layer; got {argument!r}"
        )
    if target.group.whole_model:
        raise ValueError(
            "allocation must be uniform with group model, where the scores alone say what each "
            f"layer loses; got {argument!r}"
        )
    if argument == "owl":
        return Allocation(NAMED["wanda"].criterion.metric, by_outliers)
    return _from_file(argument, target)


def _from_file(argument: str, target: Target) -> Allocation:
    shares = _read_shares(argument, target)

    def as_they_are(shapes: Shapes, score: Score, target: Target) -> Mapping[str, float]:
        layers = {layer for of_block in shapes.values() for layer in of_block}
        if different := sorted(layers ^ shares.keys()):
            where = "the file" if different[0] in shares else "the model"
            raise ValueError(
                f"allocation {argument!r} is another model's: only {where} has {different[0]}"
            )
        return shares

    return Allocation(None, as_they_are)


def _read_shares(argument: str, target: Target) -> dict[str, float]:
    """Return the shares in a file, by layer.

    Raises:
        ValueError: If it has none, or they are not for the target; one line.
    """
    path = Path(argument)
    known = f"give {', '.join(ALLOCATIONS)} or a JSON file with 'shares' by layer"
    try:
        content = read_object(path)
    except OSError as error:
        raise ValueError(f"allocation {argument!r} cannot be read: {error}; {known}") from error
    shares = content.get("shares")
    if not isinstance(shares, dict) or not all(
        isinstance(share, float | int) for share in shares.values()
    ):
        raise ValueError(f"allocation {argument!r} has no 'shares' with numbers: {known}")
    asked = {"group": target.group_name, "sparsity": target.sparsity}
    made = {key: content.get(key) for key in asked}
    if made != asked:
        raise ValueError(
            f"allocation {argument!r} is for {json.dumps(made)}, not {json.dumps(asked)}: ask for "
            "what it is for"
        )
    for layer, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"allocation {argument!r}: {layer} must be in [0, 1), got {share}")
    return dict(shares)


def by_outliers(shapes: Shapes, score: Score, target: Target) -> dict[str, float]:
    """Return each layer's fraction by the outliers of its block.

    OWL (Yin et al., 2024, arXiv:2310.05175, Section 3.3): the share of scores above M times their
    mean is mapped linearly to the fraction that stays; the highest share keeps 2 lambda more than
    the lowest. Its mean over the blocks is the sparsity; here that over all weights is, also where
    layers differ in size.

    Args:
        shapes: Of each layer's weight, by block and layer.
        score: Computes a layer's Wanda scores.
    """
    sizes = {layer: math.prod(s) for layers in shapes.values() for layer, s in layers.items()}
    outliers = [_outliers(list(layers), sizes, score) for layers in shapes.values()]
    low, high = min(outliers), max(outliers)
    scale = 2 * _OWL_RANGE / (high - low) if high > low else 0.0
    wanted = {
        layer: -scale * share
        for layers, share in zip(shapes.values(), outliers, strict=True)
        for layer in layers
    }
    return whole_counts(shifted(wanted, sizes, target.sparsity), shapes, target)


def _outliers(layers: list[str], sizes: Mapping[str, int], score: Score) -> float:
    """Return the share of outliers among the scores of some layers."""
    total = sum(sizes[layer] for layer in layers)
    mean = math.fsum(score(layer).sum(dtype=torch.float64).item() for layer in layers) / total
    return sum(count(score(layer) > _OUTLIER_FACTOR * mean) for layer in layers) / total


def shifted(
    wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return values all shifted by one number, within [0, 0.99], with a sparsity as their mean.

    Args:
        sizes: Each layer's weight in the mean.
    """
    low, high = -max(wanted.values()), 1 - min(wanted.values())
    for _ in range(60):  # halves the interval each time
        shift = (low + high) / 2
        values = {layer: min(_MOST, max(0.0, value + shift)) for layer, value in wanted.items()}
        removed = math.fsum(sizes[layer] * value for layer, value in values.items())
        low, high = (shift, high) if removed < sparsity * sum(sizes.values()) else (low, shift)
    return values


def whole_counts(
    fractions: Mapping[str, float], shapes: Shapes, target: Target
) -> dict[str, float]:
    """Return fractions that stand for whole numbers of weights.

    What is cut off goes to the next layer, so that all together lose what they should, but for
    less than one weight of each row of the last.
    """
    owed, whole = 0.0, {}
    for layers in shapes.values():
        for layer, (rows, columns) in layers.items():
            places, each = (columns, rows) if target.group.within_rows else (rows * columns, 1)
            owed += fractions[layer] * rows * columns
            removed = min(places - 1, int(owed / each + 1e-9))
            owed -= removed * each
            fraction = removed / places
            # The product with the places must not fall below the whole number by rounding.
            whole[layer] = (
                fraction if int(places * fraction) == removed else math.nextafter(fraction, 1)
            )
    return whole
