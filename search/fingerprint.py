"""Mask fingerprints: find candidates that prune the same weights without evaluating them.

A candidate is scored on a probe, a few rows of a few layers, each treated as if it were the whole
matrix. Formulas that rank the weights alike give the same mask there, whatever their text, and so
the same fingerprint. This runs in the driver and needs neither the model nor a worker.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pruning.criterion import Criterion
from pruning.masks import GROUPS, NOfM, Target
from search.probe import Probe, Stack, check_rows_differ, probe_masks, stack_layers

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


class Fingerprints:
    """Fingerprints for one or more tasks; recent masks are kept for computing distances.

    Args:
        tasks: Each task's probe of its model, and the target that a comparison group gives it.
    """

    def __init__(self, tasks: Sequence[tuple[Probe, Callable[[str], Target]]]) -> None:
        self.tasks = tasks
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

    @cached_property
    def _probed(self) -> int:
        return sum(probe.size for probe, _ in self.tasks)

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
        return tuple(_words(bits[:: 1 + bits.size // SKETCH_BYTES]) for bits in packed)

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


def _words(bits: Bits) -> Words:
    """Return bytes as words, eight of which are compared in the time of one byte."""
    return np.pad(bits, (0, -bits.size % 8)).view(np.uint64)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' names and bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
