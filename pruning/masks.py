"""Scores to masks: which weights go, in each comparison group.

Masks are boolean, True where a weight goes; one with a single column or row is for whole rows or
columns. Counts are exact and ties go leftmost first. A group is a value that holds everything
specific to it: to add a group, add a class.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.ranking import Score, lowest_of_rows, model_threshold, up_to

CROWDED = 0.9  # zeros above which a layer is warned about: its output depends on few weights
_CACHED = 1 << 20  # scores that fit the cache: below it a threshold is faster without a sample

# Layer names and masks, of shapes that expand to those of the weights, computed one at a time.
Masks = Iterator[tuple[str, Tensor]]

Shapes = Mapping[str, torch.Size]  # of the weights of all layers by name, in order
# By layer the side, 0 for rows and 1 for columns, and the indices of those that stay if not all do.
Stays = Mapping[str, tuple[int, Tensor]]


class Group(Protocol):
    """A comparison group: the weights that compete for the same places."""

    whole_model: bool = False  # whether it needs all layers' scores before the first mask

    @property
    def name(self) -> str:
        """`row`, `layer`, `model`, or a pattern such as `2:4`."""

    def rows(self, matrix: Tensor) -> Tensor:
        """Return a matrix of a layer's shape, (out_features, in_features), a group in each row."""
        return matrix

    def removed(self, size: int, fraction: float) -> int:
        """Return how many of a group of some size go."""
        return int(size * fraction)

    def mask(self, scores: Tensor, fraction: float) -> Tensor:
        """Return one layer's mask from its finite scores; high is kept."""
        rows = self.rows(scores)
        return lowest_of_rows(rows, self.removed(rows.shape[1], fraction)).reshape(scores.shape)

    def select(self, score: Score, fractions: Mapping[str, float]) -> Masks:
        """Return each layer's name and mask, given the fraction, in [0, 1), that goes of each.

        Scores are computed when a mask is due; over the whole model also twice before this returns.
        """
        return ((name, self.mask(score(name), part)) for name, part in fractions.items())

    def is_met(self, zeros: Tensor, fraction: float) -> bool:
        """Whether one layer's zeros, marked, include all that the group requires of it."""
        if self.whole_model:
            return True
        rows = self.rows(zeros).cpu().numpy()  # torch is far slower on the CPU
        least = self.removed(rows.shape[1], fraction)
        return bool((np.count_nonzero(rows, axis=1) >= least).all())

    def check(self, shapes: Shapes, fraction: float) -> None:
        """Raise ValueError if the group does not fit a model's layers."""
        return None

    def width(self, shapes: Shapes, fraction: float) -> tuple[int, int] | None:
        """Return the neurons of each MLP before and after, if that changes."""
        return None

    def mark(self, scores: Tensor, layers: Sequence[str], fraction: float) -> Tensor:
        """Return what differs if masks do, given scores of some rows and inputs of layers, (layers,
        rows, inputs): their mask as if they were all there is.
        """
        competing = scores.flatten()[None] if self.whole_model else scores.flatten(1)
        return Row().mask(competing, fraction).view_as(scores)


@dataclass(frozen=True)
class Row(Group):
    """The weights of one output row; each row loses the same share."""

    name = "row"

    def mark(self, scores: Tensor, layers: Sequence[str], fraction: float) -> Tensor:
        return self.mask(scores.flatten(0, 1), fraction).view_as(scores)


@dataclass(frozen=True)
class Layer(Group):
    """The weights of one matrix."""

    name = "layer"

    def rows(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(1, -1)

    def mask(self, scores: Tensor, fraction: float) -> Tensor:
        if scores.numel() <= _CACHED:
            return super().mask(scores, fraction)
        threshold, ties = model_threshold(lambda name: scores, {"": fraction})
        return up_to(scores, threshold, ties)[0]


@dataclass(frozen=True)
class Model(Layer):
    """The weights of all pruned matrices: one exact threshold, so scores set each layer's share.

    Ties go by layer order, then leftmost first.
    """

    name = "model"
    whole_model = True

    def select(self, score: Score, fractions: Mapping[str, float]) -> Masks:
        threshold, ties = model_threshold(score, fractions)

        def masks() -> Masks:
            nonlocal ties
            for name in fractions:
                mask, ties = up_to(score(name), threshold, ties)
                yield name, mask

        return masks()


@dataclass(frozen=True)
class NOfM(Row):
    """Every `length` inputs of a row, of which `kept` stay (Mishra et al., arXiv:2104.08378)."""

    kept: int
    length: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kept}:{self.length}"

    def rows(self, matrix: Tensor) -> Tensor:
        self.check({"these scores": matrix.shape}, 0.0)
        return matrix.reshape(-1, self.length)

    def removed(self, size: int, fraction: float) -> int:
        return self.length - self.kept

    def is_met(self, zeros: Tensor, fraction: float) -> bool:
        return not zeros.shape[1] % self.length and super().is_met(zeros, fraction)

    def check(self, shapes: Shapes, fraction: float) -> None:
        for name, (_, in_features) in shapes.items():
            if in_features % self.length:
                sizes = f"{self.length} of {in_features} in {name}"
                raise ValueError(f"pattern must divide the inputs of every layer, got {sizes}")


NEURON_SPARSITY = 0.2  # of neurons, if none is given: half of them is more than a model bears
MULTIPLE = 32  # of which the width of a pruned MLP is one if nothing else is said

# How many rows a neuron has in a layer before the activation, by the last part of the layer's name;
# none in the layer behind it, where it has a column. Phi-3's fused layer has all of one kind first.
_ROWS_OF_NEURON = {
    **{"gate_proj": 1, "up_proj": 1, "fc1": 1, "gate_up_proj": 2},
    **{"down_proj": 0, "fc2": 0},
}


@dataclass(frozen=True)
class Neurons(Group):
    """The neurons of one MLP, which go whole: it becomes narrower and keeps its form. A neuron's
    score is the magnitude of the sum of its weights' scores, or of those that take its output.
    """

    outputs_alone: bool = False  # whether the weights that take its output are all that counts
    multiple: int = MULTIPLE  # of which the new width is one: kernels are slow with some others

    @property
    def name(self) -> str:
        return "outputs" if self.outputs_alone else "neurons"

    def removed(self, size: int, fraction: float) -> int:
        return size - self.multiple * round(size * (1 - fraction) / self.multiple)

    def select(self, score: Score, fractions: Mapping[str, float]) -> Masks:
        mlps, masks = mlps_of(fractions), dict[str, Tensor]()
        for name, fraction in fractions.items():
            mlp = mlps.get(_parent(name), {})
            if name in mlp and name not in masks:
                masks |= self._masks({x: score(x) for x in self.scored(mlp)}, mlp, fraction)
            yield name, masks.pop(name, torch.zeros(1, 1, dtype=torch.bool))

    def scored(self, mlp: Mapping[str, int]) -> list[str]:
        """Return the layers of an MLP whose scores count."""
        return [name for name, rows in mlp.items() if not (rows and self.outputs_alone)]

    def _masks(
        self, scores: Mapping[str, Tensor], mlp: Mapping[str, int], fraction: float
    ) -> dict[str, Tensor]:
        total = torch.stack([of_neurons(x, mlp[name]) for name, x in scores.items()]).sum(0).abs()
        gone = lowest_of_rows(total[None], self.removed(len(total), fraction))
        return {x: gone.T.repeat(rows, 1) if rows else gone for x, rows in mlp.items()}

    def mark(self, scores: Tensor, layers: Sequence[str], fraction: float) -> Tensor:
        """Return how the neurons of each MLP, of which there are a few, are ordered."""
        by_layer, orders = dict(zip(layers, scores, strict=True)), []
        for mlp in mlps_of(layers).values():
            parts = [of_neurons(by_layer[x], mlp[x]) for x in self.scored(mlp)]
            count = min(map(len, parts))
            places = torch.arange(count)
            same = [part[places * len(part) // count] for part in parts]
            orders.append(torch.stack(same).sum(0).abs().argsort(stable=True))
        return torch.stack(orders)

    def is_met(self, zeros: Tensor, fraction: float) -> bool:
        return True  # what goes is no longer there

    def check(self, shapes: Shapes, fraction: float) -> None:
        width, left = self.width(shapes, fraction)
        if not 0 < left < width:
            rule = f"a multiple of {self.multiple} neurons of the {width} in each MLP, and not all"
            raise ValueError(f"sparsity must leave {rule}; got {fraction:g}")

    def width(self, shapes: Shapes, fraction: float) -> tuple[int, int]:
        mlp = next(iter(mlps_of(shapes).values()), {})
        if not mlp:
            rule = f"of MLPs with layers named {', '.join(_ROWS_OF_NEURON)}"
            raise ValueError(f"pattern neurons must be {rule}, got none")
        (width,) = {shapes[x][0] // rows if rows else shapes[x][1] for x, rows in mlp.items()}
        return width, width - self.removed(width, fraction)


def mlps_of(layers: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the MLPs by name, each with the rows of a neuron in its layers; 0 is a column."""
    mlps: dict[str, dict[str, int]] = {}
    for layer in layers:
        if (rows := _ROWS_OF_NEURON.get(layer.rpartition(".")[2])) is not None:
            mlps.setdefault(_parent(layer), {})[layer] = rows
    return mlps


def of_neurons(scores: Tensor, rows: int) -> Tensor:
    """Return the sums of a layer's scores, (out_features, in_features), over each neuron's weights,
    of which it has some rows, or a column: (neurons,).
    """
    return scores.sum(1).reshape(rows, -1).sum(0) if rows else scores.sum(0)


def stays_of(masks: Mapping[str, Tensor]) -> Stays:
    """Return what stays of layers with masks of whole rows or columns of which some go."""
    whole = {x: (1 if len(m) == 1 else 0, m.flatten()) for x, m in masks.items() if 1 in m.shape}
    return {
        x: (side, torch.nonzero(~gone)[:, 0]) for x, (side, gone) in whole.items() if gone.any()
    }


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0]


# The groups for unstructured sparsity by name.
WEIGHTS: dict[str, Group] = {"row": Row(), "layer": Layer(), "model": Model()}

# Those of the pattern neurons: all weights of a neuron count, or those that take its output.
NEURONS: dict[str, Group] = {"layer": Neurons(), "outputs": Neurons(outputs_alone=True)}

GROUPS = WEIGHTS | {"outputs": NEURONS["outputs"]}  # all that a metric can name


@dataclass(frozen=True)
class Target:
    """What to remove: a fraction of each comparison group, of neurons, or all but n of every m."""

    sparsity: float  # in [0, 1); ignored by n:m, which implies its own
    group: Group

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")

    @property
    def group_name(self) -> str | None:
        """The group's name; None for a pattern that has one of its own."""
        return self.group.name if self.group.name in GROUPS else None

    @property
    def pattern_text(self) -> str:
        """The pattern: `unstructured`, `neurons`, `2:4`."""
        if isinstance(self.group, Neurons):
            return "neurons"
        return "unstructured" if self.group.name in WEIGHTS else self.group.name


def group_of(name: str) -> Group:
    """Return the group of a name; raises ValueError if there is none."""
    if name not in [*GROUPS]:  # a file may say what cannot be hashed
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {name!r}")
    return GROUPS[name]


def pattern_group(pattern: str, group: str | None) -> Group | None:
    """Return the group of a pattern such as `2:4` or `neurons`; None for `unstructured`.

    A given group matters to neurons alone, if it is one of theirs.
    """
    if pattern == "unstructured":
        return None
    if pattern == "neurons":
        return NEURONS.get(str(group), NEURONS["layer"])
    kept, colon, length = pattern.partition(":")
    if colon and kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length) <= 1024:
        return NOfM(int(kept), int(length))
    rule = "unstructured, neurons, or n:m with 0 < n < m <= 1024"
    raise ValueError(f"pattern must be {rule}, got {pattern!r}")


def resolve_target(
    pattern: str,
    sparsity: float | None,
    group: str | None,
    own_group: str,
    multiple: int = MULTIPLE,
) -> Target:
    """Return what to remove: by default half, in the metric's own group, or what n:m implies."""
    wanted = own_group if group is None else group
    found = pattern_group(pattern, wanted)
    if found is None:
        if wanted not in WEIGHTS:
            way_out = ": that is of --pattern neurons" if wanted in NEURONS else ""
            raise ValueError(f"group must be one of {', '.join(WEIGHTS)}, got {wanted!r}{way_out}")
        return Target(0.5 if sparsity is None else sparsity, WEIGHTS[wanted])
    if isinstance(found, Neurons):
        if group not in (None, *NEURONS):
            rule = f"{' or '.join(NEURONS)} with pattern neurons"
            why = "a model's config has one width for all blocks"
            raise ValueError(f"group must be {rule}, since {why}; got {group!r}")
        found = replace(found, multiple=multiple)
        return Target(NEURON_SPARSITY if sparsity is None else sparsity, found)
    assert isinstance(found, NOfM)
    implied = 1 - found.kept / found.length
    if group is not None:
        rule = f"pattern {pattern}, whose weights compete within every {found.length} inputs"
        raise ValueError(f"group must be left out with {rule}; got {group!r}")
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-3):  # 0.667 is 2/3
        rule = f"{implied:g} with pattern {pattern}, or left out"
        raise ValueError(f"sparsity must be {rule}; got {sparsity}")
    return Target(implied, found)
