"""Prune a model in memory from Python, with the engine of `run_prune.py`; see docs/PYTHON.md."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning import pruner
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import (
    linear_layers,
    load_model,
    load_tokenizer,
    shapes_of,
    skip,
    width_key,
)
from prunevolve.pruning.parse import DEFAULT_GROUP, read_metric
from prunevolve.pruning.passes import Procedure, procedure_of
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.reconstruct import HELD_BACK
from prunevolve.pruning.run.options import Method, MethodArguments, make, over, read_recipe
from prunevolve.pruning.run.verify import LayerCount
from prunevolve.pruning.statistics import TERMINALS, Statistics
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
    """What was pruned, counted in the weights afterwards."""

    metric: str
    group: str | None  # `row`, `layer` or `model`; None for an n:m pattern, which has its own
    pattern: str  # `unstructured` or n:m
    layers: tuple[LayerCount, ...]  # name, zeros, size, and whether it has what was asked
    update_part: float | None = None  # how much of an update stays, where windows chose

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in all pruned layers."""
        return sum(x.zeros for x in self.layers) / sum(x.size for x in self.layers)


def collect_statistics(
    model: PreTrainedModel,
    terminals: Iterable[str],
    windows: Tensor,
    on_progress: Progress = unwatched,
) -> Statistics:
    """Collect what metrics name, such as X and G, of a dense model; its weights stay as they are.

    Statistics are fp32, on the model's device; `of(layer)` is what `Metric.score` takes. Raises
    ValueError if an argument breaks its rule.

    Args:
        model: Of a supported family, in evaluation mode, on any device.
        terminals: Names of terminals, such as `metric.terminals`; W needs nothing.
        windows: Token ids, (N, T) with T of 2 or more: a forward pass each, and a backward pass
            if a terminal needs gradients.
        on_progress: Called with the stage, the blocks done and the blocks in all.
    """
    wanted = frozenset(terminals)
    if unknown := sorted(wanted - set(TERMINALS)):
        raise ValueError(f"terminals must be among {', '.join(TERMINALS)}; got {unknown[0]!r:.40}")
    _check(model, windows)
    return pruner.collect(ResidentStore(model), windows, wanted, on_progress)


def prune(
    model: PreTrainedModel,
    metric: Metric | Criterion | str | None = None,
    windows: Tensor | None = None,
    *,
    held_back: Tensor | None = None,
    recipe: str | None = None,
    statistics: Statistics | None = None,
    on_progress: Progress = unwatched,
    **options: Unpack[MethodArguments],
) -> PruneReport:
    """Set the lowest-scoring weights of a model's decoder blocks to zero, in place.

    With the pattern `neurons` the MLPs become narrower, and with them the model and its config.
    With windows held back an update goes as far as they choose, 0 to 1 of the way. Until that is
    known, the dense weights stay in memory.

    Raises ValueError if an argument breaks its rule, a statistic is needed and neither given nor to
    be had from windows, or scores are not finite or all the same, which leaves earlier blocks
    pruned.

    Args:
        model: Of a supported family, in evaluation mode, on any device.
        metric: A metric, one with its group, or what `read_metric` reads; `sparsegpt` is the
            method of that name. None for the recipe's.
        windows: Calibration text as token ids, (N, T); None where no statistic is needed.
        held_back: Other windows, (N, T), whose losses choose how much of an update stays. None: one
            of eight of those for the calibration, the first, the ninth and so on, of which no
            statistics are.
        recipe: Such as `best`; other arguments go over it, and what it says of texts is not read.
        statistics: Of this model, dense, from `collect_statistics`: what they have needs no
            windows in a one-shot pruning. For an update, of windows that are not held back.
        on_progress: Called with the stage, the blocks done and the blocks in all.
        options: The command line's options about the method, by name and with its defaults:
            `sparsity`, `pattern`, `group`, `skip`, `propagation`, `update`, `seed`.
    """
    procedure, skipped = _procedure(metric, recipe, options)
    _check(model, windows)
    _check(model, held_back)
    try:
        skip(model, skipped)
        _check_given(procedure, statistics or Statistics(), linear_layers(model), windows)
        texts = _texts(windows, held_back, procedure.guarded)
        return _pruned(model, procedure, texts, statistics, on_progress)
    finally:
        skip(model, None)


def _pruned(
    model: PreTrainedModel,
    procedure: Procedure,
    texts: Mapping[str, Tensor],
    statistics: Statistics | None,
    on_progress: Progress,
) -> PruneReport:
    layers, text = linear_layers(model), procedure.metric.text
    records: dict[str, JsonObject] = {}
    target = procedure.target
    width = target.group.width(shapes_of(model), target.sparsity)
    pruner.prune(
        ResidentStore(model, narrows=True),
        procedure,
        texts,
        statistics={**statistics} if statistics else None,
        on_progress=on_progress,
        record=records.__setitem__,
        losses=window_losses,
    )
    if width:
        setattr(model.config.get_text_config(), width_key(model.config), width[1])
    counts = tuple(
        LayerCount.of(name, layer.weight.detach().cpu(), target) for name, layer in layers.items()
    )
    part = records.get("guard", {}).get("part")
    return PruneReport(text, target.group_name, target.pattern_text, counts, part)


def _procedure(
    metric: Metric | Criterion | str | None, recipe: str | None, options: MethodArguments
) -> tuple[Procedure, str | None]:
    """Return how to prune, and which layers to skip."""
    method = make(Method, {**options}, "prune")
    if recipe is not None:
        given = {**options} | ({} if metric is None else {"metric": metric})
        wanted = over(given, read_recipe(recipe, options.get("pattern")))
        metric = wanted.get("metric")
        method = Method(**{name: wanted[name] for name in Method.model_fields if name in wanted})
    criterion = read_metric(metric) if isinstance(metric, str) else metric
    if isinstance(criterion, Metric):
        criterion = Criterion(criterion, DEFAULT_GROUP)
    if not isinstance(criterion, Criterion):
        forms = "a Metric, a Criterion or what read_metric reads"
        raise ValueError(f"metric must be {forms}; got {type(metric).__name__}, and no recipe's")
    return procedure_of(method, criterion, own_masks=metric == SPARSEGPT), method.skip


def _texts(windows: Tensor | None, held_back: Tensor | None, guarded: bool) -> dict[str, Tensor]:
    """Return windows by what they are for; those held back, if needed, are part of those given."""
    if windows is None:
        return {}
    if guarded and held_back is None and len(windows) > 1:
        is_held_back = torch.arange(len(windows)) % HELD_BACK == 0
        windows, held_back = windows[~is_held_back], windows[is_held_back]
    return {"calibration": windows} | ({} if held_back is None else {"held_back": held_back})


def _check_given(
    procedure: Procedure,
    statistics: Statistics,
    layers: Mapping[str, nn.Linear],
    windows: Tensor | None,
) -> None:
    """Raise ValueError for statistics of another model, or if some lack and there is no window."""
    missing = {*procedure.pruned_terminals}
    for terminal, (name, layer) in product(procedure.dense_terminals, layers.items()):
        expected = TERMINALS[terminal].shape.sizes(*layer.weight.shape)
        statistic = statistics.get(f"{terminal}/{name}")
        if statistic is None:
            missing.add(terminal)
        elif (got := tuple(statistic.shape)) != expected:
            rule = f"{terminal} of {name} must be {expected}"
            raise ValueError(f"statistics must be this model's: {rule}, got {got}")
    if windows is None and (missing or procedure.training):
        why = f"which needs {', '.join(sorted(missing)) or 'them for its update'}"
        text = procedure.metric.text
        raise ValueError(f"windows must be given for metric '{text}', {why}; got None")


def _check(model: PreTrainedModel, windows: Tensor | None) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be one of transformers, got {type(model).__name__}")
    if not linear_layers(model):
        raise ValueError(f"model {model.config.model_type} has no linear layers to prune")
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training: model.eval()")
    if windows is None:
        return
    config = model.config.get_text_config()
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    shape = tuple(windows.shape) if isinstance(windows, Tensor) else ()
    if len(shape) != 2 or shape[0] < 1 or not 2 <= shape[1] <= context:
        rule = f"(N, T) with N of 1 or more and T of 2 to {context}, the model's context"
        raise ValueError(f"windows must be a tensor {rule}; got {shape or type(windows).__name__}")
    if windows.is_floating_point() or windows.dtype == torch.bool:
        raise ValueError(f"windows must be token ids, of an integer dtype; got {windows.dtype}")
    low, high = torch.aminmax(windows)
    if low < 0 or high >= vocabulary:
        rule = f"ids from 0 to {vocabulary - 1}"
        raise ValueError(f"windows must hold {rule}, got {int(low)} to {int(high)}")
