"""Scores to masks: which weights go, in each comparison group.

Masks are boolean, True where a weight goes. Counts are exact and ties go leftmost first. A group
is a value that holds everything specific to it: to add a group, add a class.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from prunevolve.pruning.ranking import Score, lowest_of_rows, model_threshold, up_to

CROWDED = 0.9  # zeros above which a layer is warned about: its output depends on few weights
_CACHED = 1 << 20  # scores that fit the cache: below it a threshold is faster without a sample

# Layer names and masks, each shaped like the layer's weight, computed one at a time.
Masks = Iterator[tuple[str, Tensor]]


class Group(Protocol):
    """A comparison group: the weights that compete for the same places."""

    whole_model: bool = False  # whether it needs all layers' scores before the first mask
    within_rows: bool = False  # whether each row's mask is independent of the other rows

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

    def check_layer(self, name: str, in_features: int) -> None:
        """Raise ValueError if the group does not fit a layer's number of inputs."""
        return None


@dataclass(frozen=True)
class Row(Group):
    """The weights of one output row; each row loses the same share."""

    name = "row"
    within_rows = True


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
class NOfM(Group):
    """Every `length` inputs of a row, of which `kept` stay (Mishra et al., arXiv:2104.08378)."""

    kept: int
    length: int
    within_rows = True

    @property
    def name(self) -> str:
        return f"{self.kept}:{self.length}"

    def rows(self, matrix: Tensor) -> Tensor:
        self.check_layer("these scores", matrix.shape[1])
        return matrix.reshape(-1, self.length)

    def removed(self, size: int, fraction: float) -> int:
        return self.length - self.kept

    def is_met(self, zeros: Tensor, fraction: float) -> bool:
        return not zeros.shape[1] % self.length and super().is_met(zeros, fraction)

    def check_layer(self, name: str, in_features: int) -> None:
        if in_features % self.length:
            sizes = f"{self.length} of {in_features} in {name}"
            raise ValueError(f"pattern must divide the inputs of every layer, got {sizes}")


# The groups for unstructured sparsity by name.
GROUPS: dict[str, Group] = {"row": Row(), "layer": Layer(), "model": Model()}


@dataclass(frozen=True)
class Target:
    """What to remove: a fraction of each comparison group, or all but n of every m."""

    sparsity: float  # in [0, 1); ignored by n:m, which implies its own
    group: Group

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")

    @property
    def group_name(self) -> str | None:
        """The group's name; None for n:m, which is a pattern."""
        return self.group.name if self.group.name in GROUPS else None

    @property
    def pattern_text(self) -> str:
        """The text that `parse_pattern` reads: `unstructured`, `2:4`."""
        return "unstructured" if self.group_name else self.group.name


def group_of(name: str) -> Group:
    """Return the group for unstructured sparsity of a name; raises ValueError if there is none."""
    if name not in [*GROUPS]:  # a file may say what cannot be hashed
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {name!r}")
    return GROUPS[name]


def parse_pattern(text: str) -> NOfM | None:
    """Return the group of a pattern such as `2:4`, or None for `unstructured`."""
    if text == "unstructured":
        return None
    kept, colon, length = text.partition(":")
    if colon and kept.isdecimal() and length.isdecimal() and 0 < int(kept) < int(length) <= 1024:
        return NOfM(int(kept), int(length))
    raise ValueError(f"pattern must be unstructured or n:m with 0 < n < m <= 1024, got {text!r}")


def resolve_target(
    pattern: str, sparsity: float | None, group: str | None, own_group: str
) -> Target:
    """Return what to remove: by default half, in the metric's own group, or what n:m implies."""
    n_of_m = parse_pattern(pattern)
    if n_of_m is None:
        fraction = 0.5 if sparsity is None else sparsity
        return Target(fraction, group_of(own_group if group is None else group))
    implied = 1 - n_of_m.kept / n_of_m.length
    if group is not None:
        rule = f"pattern {pattern}, whose weights compete within every {n_of_m.length} inputs"
        raise ValueError(f"group must be left out with {rule}; got {group!r}")
    if sparsity is not None and not math.isclose(sparsity, implied, abs_tol=1e-3):  # 0.667 is 2/3
        rule = f"{implied:g} with pattern {pattern}, or left out"
        raise ValueError(f"sparsity must be {rule}; got {sparsity}")
    return Target(implied, n_of_m)
