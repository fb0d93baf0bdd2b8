"""Mask fingerprints: find candidates that prune the same weights without evaluating them.

A candidate is scored on a probe, a few rows and inputs of a few layers, each treated as if it were
the whole matrix. Formulas that rank the weights alike give the same mask there, whatever their
text, and so the same fingerprint. This runs in the driver, in a time that does not depend on the
size of the models.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prunevolve.pruning.compiled import compiled
from prunevolve.pruning.masks import DegenerateScores, NOfM, Row, Target
from prunevolve.pruning.metric import Criterion, Metric, interned
from prunevolve.pruning.recipe import check_extremes
from prunevolve.pruning.statistics import LEAVES, Statistics

ROWS, INPUTS = 16, 32
"""Rows and inputs taken of each probed layer, evenly spaced. How well masks on 128 inputs predict a
fitness is no better than on 32, and the time is a third of theirs (docs/LOG.md)."""

Words = npt.NDArray[np.uint64]
"""A mask on the probe, packed."""

Scores = list[Tensor]
"""Of each stack of layers, (layers, rows, inputs)."""

_SKETCHED = 16
"""Words of a mask in a sketch, at most."""

_KEPT = 4096
"""Number of criteria whose masks are kept in memory, twice a kilobyte for each task."""

_PARTS = 512
"""Number of parts of formulas whose values are kept in memory, 100 KB each for two models: most
parts of a child are its parents' or its siblings'."""


@dataclass(frozen=True)
class Probe:
    """A few rows and inputs of a few layers.

    Attributes:
        weights: Dense weights by layer name, (rows, inputs), fp32.
        statistics: The collected statistics of the same rows and inputs.
    """

    weights: Mapping[str, Tensor]
    statistics: Statistics

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
    weights: Mapping[str, Tensor],
    statistics: Statistics,
    blocks: Iterable[str],
    targets: Iterable[Target] = (),
) -> Probe:
    """Take the probe: a part of every linear layer of an early, a middle and a late block.

    Args:
        weights: Dense weights by layer name.
        statistics: The statistics of the same layers.
        blocks: Names of the decoder blocks, in order.
        targets: What is asked of the model: the groups of an n:m pattern are taken whole.
    """
    names = list(blocks)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    layers = [name for name in weights if any(name.startswith(f"{block}.") for block in chosen)]
    run = math.lcm(*(t.group.length for t in targets if isinstance(t.group, NOfM)))
    parts: dict[str, Tensor] = {}
    for layer in layers:
        for leaf, values in {"W": weights[layer], **statistics.of(layer)}.items():
            shape = LEAVES[leaf].shape
            if shape.by_row:
                values = values[_evenly(values.shape[0], ROWS)]
            if shape.by_column:
                values = values[:, _evenly(values.shape[1], INPUTS, run)]
            parts[f"{leaf}/{layer}"] = values.detach().float().cpu().clone()
    return Probe.from_tensors(parts)


def _evenly(count: int, taken: int, run: int = 1) -> Tensor:
    """Return about `taken` of so many places, in runs at an even distance."""
    runs = count // run
    chosen = min(runs, max(1, taken // run))
    starts = torch.arange(chosen) * runs // chosen * run
    return (starts[:, None] + torch.arange(run)).flatten()


@dataclass(frozen=True)
class Stack:
    """Probed layers of one shape, scored in one call: on so few rows each call's overhead counts.

    Attributes:
        layers: Their names.
        of_probe: The places of each probe's layers, by its number.
        leaves: Absolute weights and statistics by leaf, (layers, rows or 1, inputs or 1), fp32.
    """

    layers: list[str]
    of_probe: dict[int, slice]
    leaves: dict[str, Tensor]
    _known: dict[Metric, Tensor] = field(default_factory=dict)

    def score(self, metric: Metric) -> Tensor:
        """Return the scores, (layers, rows, inputs), fp32; they may be non-finite."""
        if not self._known or len(self._known) > _PARTS:
            self._known.clear()
            self._known.update({interned(leaf): value for leaf, value in self.leaves.items()})
        absolute = self.leaves["W"]
        return metric.evaluate(self._known, absolute.device).expand_as(absolute)

    def check(self, metric: Metric) -> None:
        """Raise DegenerateScores if a layer's scores are not finite or are constant."""
        scores = self.score(metric)
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
        probes = list({id(probe): probe for probe, _ in tasks}.values())
        self._probe_of = [[p is probe for p in probes].index(True) for probe, _ in tasks]
        self._first_of_each = [self._probe_of.index(number) for number in range(len(probes))]
        self._probed = sum(w.numel() for probe, _ in tasks for w in probe.weights.values())
        self._stacks = stack_layers(probes)
        self._mask_of = lru_cache(_KEPT * len(tasks))(self._packed_mask)
        self._mask = lru_cache(_KEPT)(self._packed_masks)

    def fingerprint(self, criterion: Criterion) -> str:
        """Return a hash of a criterion's masks on the probes, 16 hexadecimal digits.

        Raises:
            DegenerateScores: If a probed layer's scores are not finite or are constant, or if in
                every layer all rows have the same mask.
        """
        for stack in self._stacks:
            stack.check(criterion.metric)
        for task, (_, target_of) in enumerate(self.tasks):
            scores = self._scores(criterion.metric, task)
            masks = _unpacked(self._mask_of(criterion, task), scores)
            check_rows_differ(masks, target_of(criterion.group), criterion.text)
        # Two groups may agree on a few rows, but not on whole layers; nor do a sum and a mean where
        # layers of several sizes compete, though all probed parts have one size.
        told_apart = (criterion.group, criterion.group == "model" and _growth(criterion.metric))
        digest = hashlib.sha256(str(told_apart).encode())
        digest.update(self._mask(criterion).data)
        return digest.hexdigest()[:16]

    def distance(self, one: Criterion, other: Criterion) -> float:
        """Return the fraction of probed weights that one criterion removes and the other keeps.

        0 means equal masks; two unrelated masks at 50% sparsity differ in 0.5.
        """
        return float(differing_bits(self._mask(one)[None], self._mask(other))[0] / self._probed)

    def sketch(self, criterion: Criterion) -> Words:
        """Return an even sample of the mask for each model's first task.

        The masks for its other sparsities say the same: with them losses are predicted no better
        (docs/LOG.md). Scores that are not finite have a sketch, too.
        """
        masks = [self._mask_of(criterion, task) for task in self._first_of_each]
        return np.concatenate([mask[:: -(-len(mask) // _SKETCHED)] for mask in masks])

    def diversity(self, members: Sequence[Criterion], least: float) -> dict[str, float]:
        """Count members and masks at least `least` apart, and average the pairwise distances."""
        masks: list[Criterion] = []
        for member in members:
            if all(self.distance(member, other) >= least for other in masks):
                masks.append(member)
        distances = [self.distance(*pair) for pair in combinations(members, 2)]
        mean = sum(distances) / len(distances) if distances else 0.0
        return {"members": len(members), "masks": len(masks), "mean_distance": mean}

    def _packed_masks(self, criterion: Criterion) -> Words:
        """Return the masks for all tasks, one after the other."""
        return np.concatenate([self._mask_of(criterion, task) for task in range(len(self.tasks))])

    def _packed_mask(self, criterion: Criterion, task: int) -> Words:
        scores, target = self._scores(criterion.metric, task), self.tasks[task][1](criterion.group)
        try:
            mask = probe_mask(scores, target)
        except DegenerateScores:
            mask = probe_mask([stack.nan_to_num() for stack in scores], target)
        return _packed(mask)

    def _scores(self, metric: Metric, task: int) -> Scores:
        """Return a task's part of the stacks' scores."""
        probe = self._probe_of[task]
        return [
            stack.score(metric)[place]
            for stack in self._stacks
            if (place := stack.of_probe.get(probe))
        ]


@compiled
def differing_bits(masks: Words, mask: Words) -> npt.NDArray[np.int64]:
    """Return the number of bits in which each of some masks, (n, words), differs from another.

    Six times as fast as numpy's count, which writes every word three times.
    """
    counts = np.zeros(len(masks), np.int64)
    pairs, fours = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
    eights, ones = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
    for row in range(len(masks)):
        total = np.uint64(0)
        for word in range(len(mask)):
            # Neighbours are added up: of bits, of pairs, of fours; a product adds the bytes.
            bits = masks[row, word] ^ mask[word]
            bits -= (bits >> np.uint64(1)) & pairs
            bits = (bits & fours) + ((bits >> np.uint64(2)) & fours)
            total += (((bits + (bits >> np.uint64(4))) & eights) * ones) >> np.uint64(56)
        counts[row] = total
    return counts


def _growth(metric: Metric) -> object:
    """Return what a score's growth with the size of a layer depends on: an exponent, or all."""
    try:
        return metric.units.n
    except ValueError:  # its operands grow differently
        return metric.text


def _packed(mask: Tensor) -> Words:
    bits = np.packbits(mask.numpy())
    spare = -bits.size % 8
    return (np.pad(bits, (0, spare)) if spare else bits).view(np.uint64)


def _unpacked(words: Words, shaped: Sequence[Tensor]) -> list[Tensor]:
    """Return a packed mask in parts of the shapes of some tensors."""
    sizes = [tensor.numel() for tensor in shaped]
    bits = torch.from_numpy(np.unpackbits(words.view(np.uint8), count=sum(sizes)))
    return [part.view_as(x) for part, x in zip(bits.split(sizes), shaped, strict=True)]


def stack_layers(probes: Sequence[Probe]) -> list[Stack]:
    """Stack the layers of each shape, of all probes."""
    alike: dict[object, list[tuple[int, str]]] = {}
    for number, probe in enumerate(probes):
        for layer, weight in probe.weights.items():
            key = weight.shape, *probe.statistics.of(layer)
            alike.setdefault(key, []).append((number, layer))
    stacks = []
    for members in alike.values():
        leaves: dict[str, list[Tensor]] = {}
        of_probe: dict[int, slice] = {}
        for place, (number, layer) in enumerate(members):
            first = of_probe.setdefault(number, slice(place, place)).start
            of_probe[number] = slice(first, place + 1)
            values = {
                "W": probes[number].weights[layer].abs(),
                **probes[number].statistics.of(layer),
            }
            for leaf, value in values.items():
                leaves.setdefault(leaf, []).append(value)
        stacked = {leaf: torch.stack(every) for leaf, every in leaves.items()}
        stacks.append(Stack([layer for _, layer in members], of_probe, stacked))
    return stacks


def probe_mask(scores: Scores, target: Target) -> Tensor:
    """Return the mask of all layers of a probe, flat, in the order of the stacks."""
    group, fraction = target.group, target.sparsity
    if group.whole_model:
        return group.mask(_joined(scores)[None], fraction)[0]
    if group.within_rows:  # of which layer a row is does not matter
        return _joined([group.mask(stack.flatten(0, 1), fraction) for stack in scores])
    return _joined([Row().mask(stack.flatten(1), fraction) for stack in scores])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts]) if len(parts) > 1 else parts[0].flatten()


def check_rows_differ(masks: Sequence[Tensor], target: Target, metric: str) -> None:
    """Check that some layer's rows do not all have the same mask.

    Args:
        masks: (layers, rows, inputs) each.

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
