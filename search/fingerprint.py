"""Mask fingerprints: find candidates that prune the same weights without evaluating them.

A candidate is scored on a probe, a few rows of a few layers, each treated as if it were the whole
matrix. Formulas that rank the weights alike give the same mask there, whatever their text, and so
the same fingerprint. This runs in the driver and needs neither the model nor a worker.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pruning.criterion import Criterion
from pruning.leaves import LEAVES, Statistics
from pruning.masks import GROUPS, DegenerateScores, NOfM, Target, select
from pruning.metric import Metric
from pruning.ranking import lowest_per_row
from pruning.recipe import check_extremes

ROWS = 16
"""Rows taken of each probed layer, evenly spaced."""

Bits = npt.NDArray[np.uint8]
"""Masks packed into bytes."""

Words = npt.NDArray[np.uint64]
"""Masks packed into words."""

Sketch = tuple[Words, ...]
"""For each task a sample of a criterion's mask bits on the probe."""

GLANCED = 1 << 16
"""About how many weights of a probe a sketch sees: some of the inputs of a large one. All rows
stay, since means over them are rough already."""

SKETCH_BYTES = 512
"""Bytes of a task's mask that a sketch takes, at most."""

KEPT_MASKS = 1024
"""Number of masks kept in memory, tens of kilobytes each."""


@dataclass(frozen=True)
class Probe:
    """A few rows of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, in_features), fp32.
        statistics: The collected statistics of the same rows.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.weights.values())

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by `W/layer`, `G/layer` and so on, as they are stored."""
        weights = {f"W/{name}": weight for name, weight in self.weights.items()}
        return weights | self.statistics.to_tensors()

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Probe":
        """Rebuild a probe from `to_tensors`, layers in the order of their names."""
        weights = {key[2:]: tensors[key] for key in sorted(tensors) if key.startswith("W/")}
        others = {key: tensors[key] for key in sorted(tensors) if not key.startswith("W/")}
        return Probe(weights, Statistics.from_tensors(others))


def take_probe(
    weights: Mapping[str, Tensor], statistics: Statistics, blocks: Mapping[str, object]
) -> Probe:
    """Take the probe: rows of every linear layer of an early, a middle and a late block.

    Args:
        weights: Dense weights by layer name.
        statistics: The statistics of the same layers.
        blocks: The decoder blocks by name, in order.
    """
    names = list(blocks)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    layers = [name for name in weights if any(name.startswith(f"{block}.") for block in chosen)]

    def rows_of(matrix: Tensor) -> Tensor:
        step = max(1, matrix.shape[0] // ROWS)
        return matrix[::step][:ROWS].detach().float().cpu().clone()

    parts: dict[str, Tensor] = {f"W/{layer}": rows_of(weights[layer]) for layer in layers}
    for layer in layers:
        for leaf, statistic in statistics.of(layer).items():
            per_row = LEAVES[leaf].shape.by_row
            parts[f"{leaf}/{layer}"] = rows_of(statistic) if per_row else statistic.cpu().clone()
    return Probe.from_tensors(parts)


@dataclass(frozen=True)
class Stack:
    """Probed layers of one shape, scored in one call: on so few rows each call's overhead counts.

    Attributes:
        layers: Their names.
        leaves: Absolute weights and statistics by leaf, (layers, rows or 1, in_features or 1).
    """

    layers: list[str]
    leaves: dict[str, Tensor]

    def score(self, metric: Metric) -> Tensor:
        """Return the scores, (layers, rows, in_features), fp32; they may be non-finite."""
        return metric.score(**self.leaves).expand_as(self.leaves["W"])

    def check(self, metric: Metric, scores: Tensor) -> None:
        """Raise DegenerateScores if a layer's scores are not finite or are constant."""
        lowest, highest = scores.amin((1, 2)).tolist(), scores.amax((1, 2)).tolist()
        for layer, low, high in zip(self.layers, lowest, highest, strict=True):
            check_extremes(metric, layer, low, high)


class Fingerprints:
    """Fingerprints for one or more tasks; recent masks are kept for computing distances.

    Args:
        tasks: Each task's probe of its model, and the target that a comparison group gives it.
    """

    def __init__(self, tasks: Sequence[tuple[Probe, Callable[[str], Target]]]) -> None:
        self.tasks = tasks
        self._probed = sum(probe.size for probe, _ in tasks)
        probes = {id(probe): probe for probe, _ in tasks}
        self._stacks = {key: stack_layers(probe) for key, probe in probes.items()}
        block = _block(tasks)
        self._glances = {
            key: stack_layers(probe, max(1, round(probe.size / GLANCED)), block)
            for key, probe in probes.items()
        }
        self._mask = lru_cache(KEPT_MASKS)(self._packed_masks)
        self._sketched = lru_cache(KEPT_MASKS)(self._sketch)

    def fingerprint(self, criterion: Criterion) -> str:
        """Return a hash of a criterion's masks on the probes, 16 hexadecimal digits.

        Raises:
            DegenerateScores: If a probed layer's scores are not finite or are constant, or if in
                every layer all rows have the same mask.
        """
        mask = b"".join(part.tobytes() for part in self._mask(criterion))
        # Includes the group: two groups may agree on a few rows but not on whole layers.
        return hashlib.sha256(criterion.group.encode() + mask).hexdigest()[:16]

    def distance(self, one: Criterion, other: Criterion) -> float:
        """Return the fraction of probed weights that one criterion removes and the other keeps.

        0 means equal masks; two unrelated masks at 50% sparsity differ in 0.5.
        """
        pairs = zip(self._mask(one), self._mask(other), strict=True)
        differing = sum(int(np.bitwise_count(a ^ b).sum()) for a, b in pairs)
        return differing / self._probed

    def sketch(self, criterion: Criterion) -> Sketch:
        """Return for each task an even sample of a mask on some of the probe's inputs.

        It takes a fraction of a fingerprint's time. All of a task's sketches have the same size,
        those of degenerate scores too.
        """
        return self._sketched(criterion)

    def diversity(self, members: Sequence[Criterion], least: float) -> dict[str, float]:
        """Count members and masks at least `least` apart, and average the pairwise distances."""
        masks: list[Criterion] = []
        for member in members:
            if all(self.distance(member, other) >= least for other in masks):
                masks.append(member)
        distances = [self.distance(*pair) for pair in combinations(members, 2)]
        mean = sum(distances) / len(distances) if distances else 0.0
        return {"members": len(members), "masks": len(masks), "mean_distance": mean}

    def _packed_masks(self, criterion: Criterion) -> tuple[Bits, ...]:
        def checked(stack: Stack) -> Tensor:
            scores = stack.score(criterion.metric)
            stack.check(criterion.metric, scores)
            return scores

        packed = []
        for target, masks in self._masks(criterion.group, self._stacks, checked):
            check_rows_differ(masks, target, criterion.text)
            packed.append(_packed(masks))
        return tuple(packed)

    def _sketch(self, criterion: Criterion) -> Sketch:
        def finite(stack: Stack) -> Tensor:
            return stack.score(criterion.metric).nan_to_num()

        packed = (
            _packed(masks) for _, masks in self._masks(criterion.group, self._glances, finite)
        )
        samples = (bits[:: 1 + bits.size // SKETCH_BYTES] for bits in packed)
        # As words, eight bytes are compared in the time of one.
        return tuple(np.pad(bits, (0, -bits.size % 8)).view(np.uint64) for bits in samples)

    def _masks(
        self,
        group: str,
        stacks: Mapping[int, list[Stack]],
        score: Callable[[Stack], Tensor],
    ) -> Iterator[tuple[Target, list[Tensor]]]:
        """Yield each task's target and masks; a probe's scores serve all of its tasks."""
        scores: dict[int, list[Tensor]] = {}
        for probe, target_of in self.tasks:
            key, target = id(probe), target_of(group)
            if key not in scores:
                scores[key] = [score(stack) for stack in stacks[key]]
            yield target, probe_masks(scores[key], target)


def _block(tasks: Sequence[tuple[Probe, Callable[[str], Target]]]) -> int:
    """Return a number of inputs that every task's pattern divides."""
    groups = (target_of(GROUPS[0]).group for _, target_of in tasks)
    return math.lcm(16, *(group.length for group in groups if isinstance(group, NOfM)))


def _packed(masks: Sequence[Tensor]) -> Bits:
    return np.concatenate([np.packbits(mask.numpy()) for mask in masks])


def stack_layers(probe: Probe, step: int = 1, block: int = 1) -> list[Stack]:
    """Stack the layers of each shape.

    Args:
        step: Of so many blocks of inputs the first is taken, in each layer.
        block: Inputs in a block.
    """
    by_shape: dict[torch.Size, list[str]] = {}
    for layer, weight in probe.weights.items():
        by_shape.setdefault(weight.shape, []).append(layer)
    stacks = []
    for shape, layers in by_shape.items():
        taken = torch.arange(shape[1]) // block % step == 0
        leaves: dict[str, list[Tensor]] = {}
        for layer in layers:
            values = {"W": probe.weights[layer].abs(), **probe.statistics.of(layer)}
            for leaf, value in values.items():
                by_column = LEAVES[leaf].shape.by_column
                leaves.setdefault(leaf, []).append(value[:, taken] if by_column else value)
        stacks.append(Stack(layers, {leaf: torch.stack(every) for leaf, every in leaves.items()}))
    return stacks


def probe_masks(scores: Sequence[Tensor], target: Target) -> list[Tensor]:
    """Return the masks of stacks of layers, (layers, rows, in_features) each as its scores are."""
    if target.group.whole_model or target.group.within_rows:
        # Where its rows are from does not matter, so that a stack is as good as a layer.
        stacks = {str(i): stack.flatten(0, 1) for i, stack in enumerate(scores)}
        masks = [mask for _, mask in select(stacks.__getitem__, stacks, target)]
    else:
        masks = [lowest_per_row(stack.flatten(1), target.sparsity) for stack in scores]
    return [mask.view(stack.shape) for mask, stack in zip(masks, scores, strict=True)]


def check_rows_differ(masks: Sequence[Tensor], target: Target, metric: str) -> None:
    """Check that some layer's rows do not all have the same mask.

    Raises:
        DegenerateScores: If in every layer all rows have the same mask.
    """
    removes = target.group.implied_sparsity or target.sparsity
    if removes and not any((mask != mask[:, :1]).any() for mask in masks):
        raise DegenerateScores(f"'{metric}' prunes the same inputs in every row")


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' names and bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
