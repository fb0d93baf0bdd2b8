"""The leaves of the metric language: what each is, and how calibration computes it.

To add a leaf, add a row to `LEAVES` (docs/EXTENDING.md). X and G are defined as in the
Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924). Statistics are sums over windows, in
fp32 whatever the weights' dtype; no window's values are stored.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from prunevolve.pruning.operators import (
    MATRIX,
    NO_UNITS,
    NUMBER,
    PER_INPUT,
    PER_OUTPUT,
    Shape,
    Units,
)

GRADIENT_FACTOR = 100.0
"""The release multiplies gradients by this before it squares them, so that they fit into fp16."""

DAMPING = 0.01
"""Damping of the Gram matrix, as a fraction of its mean diagonal: as in SparseGPT (Frantar and
Alistarh, 2023, arXiv:2301.00774, Section 4)."""

_MOST_DAMPINGS = 4

Source = Literal["weight", "inputs", "output gradients", "weight gradients"]
"""What a leaf is made of. Inputs come from forward passes, gradients from backward passes."""


@dataclass(frozen=True)
class Seen:
    """What a sum has seen.

    Attributes:
        windows: Number of calibration windows.
        tokens: Number of tokens in all of them.
        depth: Relative depth of the layer's block, from 0, the first, to 1, the last.
    """

    windows: int
    tokens: int
    depth: float = 0.0


class Sum(Protocol):
    """A running sum of one leaf over the windows, for one layer."""

    def add(self, values: Tensor, rows: slice) -> None:
        """Add one window's values in fp32, gradients times `GRADIENT_FACTOR`.

        Args:
            values: Inputs (tokens, in_features), output gradients (tokens, out_features), some rows
                of the weight's gradient, (rows, in_features), or the cosines of the block's input
                and output, (tokens, 1).
            rows: Which rows of the weight; all if the values are not its gradient.
        """

    def result(self, seen: Seen) -> Tensor:
        """Return the statistic; the sum cannot be used afterwards."""


@dataclass(frozen=True)
class Leaf:
    """A statistic that a metric can name.

    Attributes:
        meaning: What it is, in words.
        shape: The sides along which it varies.
        source: What it is made of.
        units: Exponents of the scales that layers and models do not share.
        start: Returns an empty sum for a layer; None for W, which needs no calibration.
        signed: Whether it can be negative.
        gram: Whether its sum is an (in_features, in_features) matrix.
        of_block: Whether it is made of the whole block's input and output, not the layer's inputs.
    """

    meaning: str
    shape: Shape
    source: Source
    units: Units
    start: Callable[[nn.Linear], Sum] | None
    signed: bool = False
    gram: bool = False
    of_block: bool = False


class _SquaredNorms:
    def __init__(self, layer: nn.Linear) -> None:
        self._total = _per_input(layer)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total += values.square().sum(0, keepdim=True)

    def result(self, seen: Seen) -> Tensor:
        return self._total / seen.windows


class _Variances:
    def __init__(self, layer: nn.Linear) -> None:
        self._mean, self._deviations, self._tokens = _per_input(layer), _per_input(layer), 0

    def add(self, values: Tensor, rows: slice) -> None:
        # Squared deviations are merged window by window (Chan et al., 1983): the mean square minus
        # the squared mean would cancel for a channel that is far from zero.
        variance, mean = torch.var_mean(values, 0, correction=0, keepdim=True)
        share = len(values) / (self._tokens + len(values))
        apart = mean - self._mean
        self._deviations += len(values) * (variance + apart.square() * (1 - share))
        self._mean = self._mean + apart * share
        self._tokens += len(values)

    def result(self, seen: Seen) -> Tensor:
        return self._deviations / seen.tokens


class _Gram:
    def __init__(self, layer: nn.Linear) -> None:
        sides = layer.in_features, layer.in_features
        self._total = torch.zeros(sides, device=layer.weight.device)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total.addmm_(values.T, values)

    def result(self, seen: Seen) -> Tensor:
        return self._total.div_(seen.windows)


class _InverseGramDiagonal(_Gram):
    def result(self, seen: Seen) -> Tensor:
        factor = damped_factor(super().result(seen))
        return torch.cholesky_inverse(factor).diagonal()[None].clone()


def damped_factor(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix, (n, n), damped until it has one in fp32.

    The matrix is overwritten. The factor is lower triangular, and not finite if the matrix is not.
    """
    diagonal = gram.diagonal().clone()
    damping = DAMPING * diagonal.mean()
    for _ in range(_MOST_DAMPINGS):
        gram.diagonal().copy_(diagonal + damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            break
        damping = 10 * damping + torch.finfo(gram.dtype).tiny
    damped: Tensor = factor
    return damped


class _Depth:
    def __init__(self, layer: nn.Linear) -> None:
        self._device = layer.weight.device

    def add(self, values: Tensor, rows: slice) -> None:
        """Do nothing: depth does not depend on the text."""

    def result(self, seen: Seen) -> Tensor:
        return torch.full((1, 1), seen.depth, device=self._device)


class _BlockInfluence:
    def __init__(self, layer: nn.Linear) -> None:
        self._total = torch.zeros(1, 1, device=layer.weight.device)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total += values.sum()

    def result(self, seen: Seen) -> Tensor:
        return (1 - self._total / seen.tokens).clamp(min=0)  # of two equal states, rounding left


class _SquaredOutputGradients:
    def __init__(self, layer: nn.Linear) -> None:
        self._total = torch.zeros(layer.out_features, 1, device=layer.weight.device)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total += values.square().sum(0)[:, None]

    def result(self, seen: Seen) -> Tensor:
        return self._total.div_(seen.tokens).sqrt_()


class _SquaredGradients:
    def __init__(self, layer: nn.Linear) -> None:
        self._total = torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=False)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total[rows].addcmul_(values, values)

    def result(self, seen: Seen) -> Tensor:
        return self._total.sqrt_()


class _GradientsAwayFromZero:
    def __init__(self, layer: nn.Linear) -> None:
        self._weight = layer.weight.detach()
        self._total = torch.zeros_like(self._weight, dtype=torch.float32)

    def add(self, values: Tensor, rows: slice) -> None:
        self._total[rows].addcmul_(values, self._weight[rows].sign().float(), value=-1)

    def result(self, seen: Seen) -> Tensor:
        return self._total


LEAVES: dict[str, Leaf] = {
    "W": Leaf("absolute weight", MATRIX, "weight", Units(w=1), None),
    "G": Leaf(
        "root of the sum over windows of (100 x gradient of the loss by the weight) squared",
        MATRIX,
        "weight gradients",
        Units(w=-1),
        _SquaredGradients,
    ),
    "X": Leaf(
        "mean over windows of the squared L2 norm of an input channel over tokens; no root",
        PER_INPUT,
        "inputs",
        Units(x=2),
        _SquaredNorms,
    ),
    "V": Leaf(
        "population variance over all tokens of the activation of an input channel",
        PER_INPUT,
        "inputs",
        Units(x=2),
        _Variances,
    ),
    "B": Leaf(
        "root of the mean over all tokens of (100 x gradient of the loss by the output) squared",
        PER_OUTPUT,
        "output gradients",
        Units(w=-1, x=-1),
        _SquaredOutputGradients,
    ),
    "H": Leaf(
        "diagonal of the inverse of the inputs' Gram matrix, which is the mean over windows of "
        "x x^T summed over tokens, with 1% of its mean diagonal added to the diagonal",
        PER_INPUT,
        "inputs",
        Units(x=-2),
        _InverseGramDiagonal,
        gram=True,
    ),
    "D": Leaf(
        "relative depth of the layer's block, from 0, the first, to 1, the last",
        NUMBER,
        "inputs",
        NO_UNITS,
        _Depth,
        of_block=True,
    ),
    "I": Leaf(
        "influence of the layer's block: one minus the mean over all tokens of the cosine of the "
        "block's input and output (ShortGPT, Men et al., 2024, arXiv:2403.03853)",
        NUMBER,
        "inputs",
        NO_UNITS,
        _BlockInfluence,
        of_block=True,
    ),
    # W times M is, up to the factor, what the loss gains to first order by keeping the weight
    # (Sanh et al., 2020, arXiv:2005.07683, Section 4, here on a model that is not trained).
    "M": Leaf(
        "sum over windows of 100 x the fall of the loss as the weight moves away from 0: minus "
        "the gradient, along the weight's sign",
        MATRIX,
        "weight gradients",
        Units(w=-1),
        _GradientsAwayFromZero,
        signed=True,
    ),
}

LEAF_SETS: dict[str, tuple[str, ...]] = {"release": ("W", "G", "X"), "extended": tuple(LEAVES)}
"""Leaves that a search can draw from, by their name in the config."""

STATISTICS = frozenset(name for name, leaf in LEAVES.items() if leaf.start)
"""The leaves that need calibration windows."""

GRAM = "gram"
"""The Gram matrix of a layer's inputs, (in_features, in_features): the mean over windows of x x^T
summed over tokens. No metric can name it; it is for those who change masks and weights."""

COLLECTED = LEAVES | {
    GRAM: Leaf("Gram matrix of the inputs", MATRIX, "inputs", Units(x=2), _Gram, gram=True),
}
"""All that calibration can compute."""


def made_of(leaves: frozenset[str], *sources: Source) -> frozenset[str]:
    """Return the leaves that are made of one of the sources."""
    return frozenset(name for name in leaves if COLLECTED[name].source in sources)


def sums_size(layers: Iterable[nn.Linear], leaves: frozenset[str]) -> int:
    """Return the bytes of the running sums of some layers, in fp32, vectors left out."""
    rows = [COLLECTED[name] for name in leaves]
    matrices = sum(
        leaf.shape == MATRIX and leaf.start is not None and not leaf.gram for leaf in rows
    )
    grams = sum(leaf.gram for leaf in rows)
    sides = [(layer.in_features, layer.out_features) for layer in layers]
    sums = sum(inputs * (outputs * matrices + inputs * grams) for inputs, outputs in sides)
    # Gram matrices are factored and inverted one layer at a time.
    return 4 * (sums + 2 * max(inputs for inputs, _ in sides) ** 2 * bool(grams))


def need_backward(leaves: frozenset[str]) -> frozenset[str]:
    """Return the leaves that need backward passes."""
    return made_of(leaves, "output gradients", "weight gradients")


class Statistics(dict[str, Mapping[str, Tensor]]):
    """Statistics by leaf and layer name, each of its leaf's shape; in fp32 unless rounded."""

    def leaf(self, name: str) -> Mapping[str, Tensor]:
        """Return one leaf's statistics by layer name; empty if it was not collected."""
        assert name in STATISTICS, name
        return self.get(name, {})

    def of(self, layer: str) -> dict[str, Tensor]:
        """Return one layer's statistics by leaf, as `Metric.score` takes them."""
        return {name: self[name][layer] for name in sorted(self) if layer in self[name]}

    def rounded(self, dtype: torch.dtype) -> "Statistics":
        """Return a copy with the matrices, such as G, in another dtype.

        Vectors, such as X, stay as they are: they take a thousandth of the memory, and
        rounding them would shift whole rows and columns of scores.
        """
        matrices = {name for name in self if LEAVES[name].shape == MATRIX}
        return Statistics(
            {
                name: {layer: t.to(dtype) if name in matrices else t for layer, t in leaf.items()}
                for name, leaf in self.items()
            }
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all statistics by `X/layer`, `G/layer` and so on, for storage and transport."""
        return {
            f"{name}/{layer}": tensor
            for name in sorted(self)
            for layer, tensor in self[name].items()
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], device: str = "cpu") -> "Statistics":
        """Rebuild statistics from `to_tensors` on a device."""
        by_leaf: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, layer = key.split("/", 1)
            by_leaf.setdefault(name, {})[layer] = tensor.to(device)
        return Statistics(by_leaf)


def _per_input(layer: nn.Linear) -> Tensor:
    return torch.zeros(1, layer.in_features, device=layer.weight.device)
