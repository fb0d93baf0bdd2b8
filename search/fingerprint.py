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

import numpy as np
import torch
from torch import Tensor

from prunevolve.pruning.masks import NOfM, Target
from prunevolve.pruning.metric import Criterion, Metric, interned
from prunevolve.pruning.ranking import DegenerateScores, check_extremes
from prunevolve.pruning.statistics import TERMINALS, of_layer

ROWS, INPUTS = 16, 32
"""Rows and inputs taken of each probed layer, evenly spaced."""

TargetOf = Callable[[str], Target]  # returns a task's target for a comparison group

_PARTS = 512
"""Number of parts of formulas whose scores a probe keeps: most parts of a child are its parents' or
its siblings', so a candidate costs the driver two thirds of the time."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A few rows and inputs of a few layers, all of one shape; recent scores are kept."""

    layers: tuple[str, ...]
    terminals: Mapping[str, Tensor]  # W absolute, (layers, rows or 1, inputs or 1), fp32
    _scores: dict[Metric, Tensor] = field(default_factory=dict)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Probe":
        """Return the probe in `take_probe`'s tensors, layers in the order of their names."""
        layers = tuple(sorted(key[2:] for key in tensors if key.startswith("W/")))
        names = {key.partition("/")[0] for key in tensors}
        parts = {name: torch.stack([tensors[f"{name}/{x}"] for x in layers]) for name in names}
        return Probe(layers, parts | {"W": parts["W"].abs()})

    def score(self, metric: Metric) -> Tensor:
        """Return the scores, (layers, rows, inputs), fp32; they may be non-finite."""
        weights = self.terminals["W"]
        if not self._scores or len(self._scores) > _PARTS:
            self._scores.clear()
            self._scores.update({interned(name): x for name, x in self.terminals.items()})
        return metric.evaluate(self._scores, weights.device).expand_as(weights)


def take_probe(
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    blocks: Iterable[str],
    targets: Iterable[Target] = (),
) -> dict[str, Tensor]:
    """Take the probe: a part of every linear layer of an early, a middle and a late block.

    Given dense weights by layer and statistics by `X/layer`, it has parts of them by `W/layer`,
    `G/layer` and so on, fp32, of as many rows and inputs of each layer as the smallest allows. The
    groups of the targets' n:m patterns are taken whole.
    """
    names = list(blocks)
    chosen = {names[0], names[len(names) // 2], names[-1]}
    layers = [name for name in weights if any(name.startswith(f"{block}.") for block in chosen)]
    run = math.lcm(*(t.group.length for t in targets if isinstance(t.group, NOfM)))
    rows = min(ROWS, *(weights[layer].shape[0] for layer in layers))
    inputs = min(max(INPUTS, run), *(weights[layer].shape[1] for layer in layers))
    parts: dict[str, Tensor] = {}
    for layer in layers:
        for terminal, values in {"W": weights[layer], **of_layer(statistics, layer)}.items():
            if TERMINALS[terminal].shape.by_row:
                values = values[_evenly(values.shape[0], rows)]
            if TERMINALS[terminal].shape.by_column:
                values = values[:, _evenly(values.shape[1], inputs, run)]
            parts[f"{terminal}/{layer}"] = values.detach().float().cpu().clone()
    return parts


def _evenly(count: int, taken: int, run: int = 1) -> Tensor:
    """Return about `taken` of so many places, in runs at an even distance."""
    runs, chosen = count // run, taken // run
    starts = torch.arange(chosen) * runs // chosen * run
    return (starts[:, None] + torch.arange(run)).flatten()


class Fingerprints:
    """Fingerprints for tasks, given their probes and targets."""

    def __init__(self, tasks: Sequence[tuple[Probe, TargetOf]]) -> None:
        self.tasks, probes = tasks, [probe for probe, _ in tasks]
        # Each model's first task.
        self._firsts = [i for i, probe in enumerate(probes) if probe not in probes[:i]]

    def fingerprint(self, criterion: Criterion) -> str:
        """Return a hash of a criterion's masks on the probes, 16 hexadecimal digits.

        Raises DegenerateScores if a layer's scores are not finite or are constant, or if in every
        layer all rows have the same mask.
        """
        metric = criterion.metric
        for probe in (self.tasks[task][0] for task in self._firsts):
            scores = probe.score(metric)
            lowest, highest = scores.amin((1, 2)).tolist(), scores.amax((1, 2)).tolist()
            for layer, low, high in zip(probe.layers, lowest, highest, strict=True):
                check_extremes(metric.text, layer, low, high)
        # Two groups may agree on a few rows, but not on whole layers; nor do a sum and a mean where
        # layers of several sizes compete, though all probed parts have one size.
        growth = metric.units.n if metric.units else metric.text
        key = (criterion.group, criterion.group == "model" and growth)
        digest = hashlib.sha256(str(key).encode())
        for probe, target_of in self.tasks:
            target = target_of(criterion.group)
            mark = target.group.mark(probe.score(metric), probe.layers, target.sparsity).numpy()
            if mark.any() and not (mark != mark[:, :1]).any():
                raise DegenerateScores(f"'{metric.text}' prunes the same inputs in every row")
            digest.update((np.packbits(mark) if mark.dtype == bool else mark).data)
        return digest.hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors' names and bytes, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
