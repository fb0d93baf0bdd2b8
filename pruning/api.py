"""Prune a model in memory from Python, with the engine of `run_prune.py`; see docs/PYTHON.md."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunevolve.pruning import pruner, walk
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import Target, resolve_target
from prunevolve.pruning.methods import make_recipe
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import linear_layers, load_model, load_tokenizer
from prunevolve.pruning.output.verify import LayerCount
from prunevolve.pruning.parse import DEFAULT_GROUP, read_metric
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.ranking import count
from prunevolve.pruning.statistics import LEAVES, STATISTICS, Statistics
from prunevolve.pruning.store import ResidentStore

__all__ = [
    "Criterion",
    "Metric",
    "PruneReport",
    "Statistics",
    "collect_statistics",
    "load_model",
    "load_tokenizer",
    "prune",
    "read_metric",
]


@dataclass(frozen=True)
class PruneReport:
    """What was pruned, counted in the weights afterwards.

    Attributes:
        metric: The metric's text.
        group: `row`, `layer` or `model`; None for an n:m pattern, which has its own.
        pattern: `unstructured` or n:m.
        layers: Of each pruned layer its name, zeros, size, and whether it has what was asked.
    """

    metric: str
    group: str | None
    pattern: str
    layers: tuple[LayerCount, ...]

    @property
    def zeros(self) -> int:
        """Zero weights in all pruned layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def size(self) -> int:
        """Weights in all pruned layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned layers."""
        return self.zeros / self.size


def collect_statistics(
    model: PreTrainedModel,
    leaves: Iterable[str],
    windows: Tensor,
    on_progress: Progress = unwatched,
) -> Statistics:
    """Collect what metrics name, such as X and G, of a dense model; its weights stay as they are.

    Args:
        model: Of a supported family, in evaluation mode, on any device.
        leaves: Names of leaves, such as `metric.leaves`; W needs nothing.
        windows: Token ids, (N, T) with T of 2 or more: a forward pass each, and a backward pass
            if a leaf needs gradients.
        on_progress: Called with the stage, the blocks done and the blocks in all.

    Returns:
        Statistics by leaf and layer, fp32, on the model's device; `of(layer)` is what
        `Metric.score` takes.

    Raises:
        ValueError: If a leaf is unknown, or model or windows break their rule.
    """
    wanted = frozenset(leaves)
    if unknown := sorted(wanted - set(LEAVES)):
        raise ValueError(f"leaves must be among {', '.join(LEAVES)}; got {unknown[0]!r:.40}")
    _check_model(model)
    _check_windows(model, windows)
    return walk.collect(ResidentStore(model), windows, wanted, on_progress)


def prune(
    model: PreTrainedModel,
    metric: Metric | Criterion | str,
    windows: Tensor | None = None,
    *,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    group: str | None = None,
    propagation: str = "one-shot",
    update: str = "none",
    allocation: str = "uniform",
    refine: str = "none",
    statistics: Statistics | None = None,
    on_progress: Progress = unwatched,
) -> PruneReport:
    """Set the lowest-scoring weights of a model's decoder blocks to zero, in place.

    An error on the way, such as scores that are all the same, leaves the blocks pruned that came
    before it.

    Args:
        model: Of a supported family, in evaluation mode, on any device.
        metric: A metric, one with its group, or what `read_metric` reads; `sparsegpt` is the
            method of that name.
        windows: Calibration text as token ids, (N, T); None where no statistic is needed.
        sparsity: Fraction to remove, in [0, 1); None for 0.5, or what an n:m pattern implies.
        pattern: `unstructured`, or n:m to keep n of every m consecutive inputs.
        group: Weights that compete: `row`, `layer` or `model`; None for the metric's own, which
            is `row` for a bare metric.
        propagation: `one-shot` for statistics of the dense model; `sequential` takes those of
            inputs behind the blocks pruned before.
        update: What happens to the weights that stay: `none`, `sparsegpt` or `reconstruct`.
        allocation: How much each layer loses: `uniform`, `owl` or a file.
        refine: What improves the masks: `none`, `swaps`, or `swaps:N` for N in a row at most.
        statistics: Of this model, dense, from `collect_statistics`: what they have needs no
            windows in a one-shot pruning.
        on_progress: Called with the stage, the blocks done and the blocks in all.

    Returns:
        The zeros of each layer.

    Raises:
        ValueError: If an argument breaks its rule, a statistic is needed and neither given nor
            to be had from windows, or scores are not finite or all the same.
    """
    criterion = _criterion_of(metric)
    target = resolve_target(pattern, sparsity, group, criterion.group)
    own_masks = metric == SPARSEGPT
    recipe = make_recipe(
        criterion.metric, target, propagation, update, allocation, refine, own_masks
    )
    _check_model(model)
    missing = recipe.pruned_leaves | _missing(model, recipe.dense_leaves, statistics)
    if windows is not None:
        _check_windows(model, windows)
    elif missing or recipe.training:
        raise ValueError(
            f"windows must be given for metric '{criterion.text}', which needs "
            f"{', '.join(sorted(missing)) or 'them for its update'}; got None"
        )
    found: dict[str, JsonObject] = {}
    pruner.prune(
        ResidentStore(model),
        recipe,
        walk.Texts(torch.zeros(0, 2, dtype=torch.int64) if windows is None else windows),
        statistics=statistics.to_tensors() if statistics else None,
        on_progress=on_progress,
        tell=found.__setitem__,
    )
    return _report(model, criterion.metric, target, found.get("shares", {}))


def _criterion_of(metric: Metric | Criterion | str) -> Criterion:
    if isinstance(metric, str):
        return read_metric(metric)
    return Criterion(metric, DEFAULT_GROUP) if isinstance(metric, Metric) else metric


def _report(
    model: PreTrainedModel, metric: Metric, target: Target, shares: JsonObject
) -> PruneReport:
    layers = []
    for name, layer in linear_layers(model).items():
        zero = layer.weight.detach() == 0
        holds = target.group.owes(zero, shares.get(name, target.sparsity))
        layers.append(LayerCount(name, count(zero), zero.numel(), holds))
    return PruneReport(metric.text, target.group_name, target.pattern_text, tuple(layers))


def _missing(
    model: PreTrainedModel, leaves: frozenset[str], statistics: Statistics | None
) -> frozenset[str]:
    """Return the leaves that the statistics lack for some layer.

    Raises:
        ValueError: If one has another shape than the layer asks for: it is another model's.
    """
    missing = set()
    for leaf in leaves & STATISTICS:
        by_layer = statistics.leaf(leaf) if statistics else {}
        for name, layer in linear_layers(model).items():
            if name not in by_layer:
                missing.add(leaf)
                continue
            by_row, by_column = LEAVES[leaf].shape
            expected = (layer.out_features if by_row else 1, layer.in_features if by_column else 1)
            if tuple(by_layer[name].shape) != expected:
                raise ValueError(
                    f"statistics must be this model's: {leaf} of {name} must be {expected}, got "
                    f"{tuple(by_layer[name].shape)}"
                )
    return frozenset(missing)


def _check_model(model: PreTrainedModel) -> None:
    if not linear_layers(model):
        raise ValueError(f"model {model.config.model_type} has no linear layers to prune")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training: model.eval()")


def _check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows must be (N, T) with N of 1 and T of 2 or more, got {tuple(windows.shape)}"
        )
    if windows.is_floating_point() or windows.dtype == torch.bool:
        raise ValueError(f"windows must be token ids, of an integer dtype; got {windows.dtype}")
    low, high = torch.aminmax(windows)
    vocabulary = model.config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"windows must hold ids from 0 to {vocabulary - 1}, got {int(low)} to {int(high)}"
        )
