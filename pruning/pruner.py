"""Prune a model: score, select, refine, update, train and write its blocks, in the passes it takes.

The search scores and masks its candidates with the same code.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunevolve.pruning.allocation import Shapes
from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.compiled import zero_marked
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import decoder_blocks, layers_of_block, linear_layers
from prunevolve.pruning.passes import Walk, passes_of
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.recipe import Recipe, Removal, score_layer
from prunevolve.pruning.reconstruct import Lesson
from prunevolve.pruning.statistics import GRAM, Statistics
from prunevolve.pruning.store import Store
from prunevolve.pruning.stream import Texts

Tell = Callable[[str, JsonObject], object]
"""Called with the name of something that was found out, and with it."""


def prune(
    store: Store,
    recipe: Recipe,
    texts: Texts,
    states: Offload | None = None,
    statistics: Offload | None = None,
    on_progress: Progress = unwatched,
    kept_scores: MutableMapping[str, Tensor] | None = None,
    tell: Tell = lambda name, value: None,
) -> None:
    """Zero the lowest-scoring weights of a model's decoder blocks, block by block.

    Blocks that the store has already written stay as they are.

    Args:
        states: Where hidden states are put aside; None for memory.
        statistics: Where statistics of the dense model are put aside, by `G/layer`, and stay;
            those already there are used. None keeps them in memory for as long as they are needed.
        kept_scores: Where all layers' scores are kept, in fp32, for another target; those already
            there are used. None keeps none, and computes them three times for a threshold over the
            whole model.
        tell: Called with `shares` and what the recipe's allocation gives each layer, before the
            first block is pruned; with a trained block's name and its errors by part.

    Raises:
        DegenerateScores: If a layer's scores are not finite or constant.
        ValueError: If n:m does not divide a layer.
        OSError: If a disk is full.
    """
    check_layers(store.model, recipe.target)
    pruner = _Pruner(
        store,
        recipe,
        statistics={} if statistics is None else statistics,
        forgets=statistics is None,
        kept_scores=kept_scores,
        tell=tell,
    )
    walk = Walk(
        store,
        texts,
        {} if states is None else states,
        missing=pruner.missing,
        keep=pruner.keep,
        on_progress=on_progress,
        select=pruner.select,
        is_done=pruner.is_done,
        prune=pruner.prune_block,
    )
    missing = frozenset[str]().union(*map(pruner.missing, store.blocks))
    try:
        walk.run(passes_of(recipe, missing))
    finally:
        pruner.removals = iter(())  # which refer to the pruner: its scores go now, not some day
        store.finish()


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Return the shapes of a model's prunable layers, by block and layer."""
    return {
        block: {
            layer: (module.out_features, module.in_features)
            for layer, module in layers_of_block(block, blocks).items()
        }
        for block, blocks in decoder_blocks(model).items()
    }


def check_layers(model: PreTrainedModel, target: Target) -> None:
    """Raise ValueError if n:m does not divide a layer; called before any work."""
    for name, layer in linear_layers(model).items():
        target.group.check_layer(name, layer.in_features)


@dataclass
class _Pruner:
    """One pruning in progress.

    Attributes:
        statistics: Of the dense model, by `G/layer`.
        forgets: Whether a layer's statistics are dropped once it is pruned.
        behind: Statistics of inputs that passed pruned blocks, by `X/layer`.
        removals: Layer names and what goes of them, in the order in which they are pruned.
    """

    store: Store
    recipe: Recipe
    statistics: Offload
    forgets: bool
    kept_scores: MutableMapping[str, Tensor] | None
    tell: Tell
    behind: dict[str, Tensor] = field(default_factory=dict)
    removals: Iterator[tuple[str, Removal]] = field(default_factory=lambda: iter(()))

    def missing(self, block: str) -> frozenset[str]:
        """Return the leaves of the dense model that a block needs and that are not there yet."""
        if self.is_done(block):
            return frozenset()
        layers = self.store.layers[block]
        return frozenset(
            leaf
            for leaf in self.recipe.dense_leaves
            if any(f"{leaf}/{layer}" not in self.statistics for layer in layers)
        )

    def is_done(self, block: str) -> bool:
        """Whether a block's scores are no longer needed; one threshold needs all to the end."""
        written = self.store.written
        return block in written and (
            not self.recipe.needs_all_scores or written.issuperset(self.store.blocks)
        )

    def keep(self, statistics: Statistics, behind: bool) -> None:
        """Take a block's statistics, of the dense model or of inputs behind pruned blocks."""
        if behind:
            self.behind.update(statistics.to_tensors())
        for key, tensor in statistics.to_tensors().items() if not behind else ():
            self.statistics[key] = tensor.cpu() if self._waits else tensor

    @property
    def _waits(self) -> bool:
        """Whether statistics wait for a later pass: in host memory, not in a GPU's."""
        recipe = self.recipe
        waits = recipe.needs_all_scores or recipe.sequential or recipe.follows
        return waits or not self.forgets

    def select(self, blocks: list[str]) -> None:
        """Decide what goes of each layer: now, or when it is due if the group allows that."""
        store, target = self.store, self.recipe.target
        left = {block: store.layers[block] for block in blocks if not self.is_done(block)}
        shares = self._shares() if left else {}
        fractions = {
            layer: shares.get(layer, target.sparsity)
            for layers in left.values()
            for layer in layers
        }
        if self.recipe.own_masks:
            self.removals = iter(fractions.items())
        else:
            self.removals = target.group.select(self._score, fractions)

    def _shares(self) -> Mapping[str, float]:
        """Return what the allocation gives each layer; nothing without one."""
        allocation = self.recipe.allocation
        if allocation is None:
            return {}
        score = partial(self._score_by, allocation.metric or self.recipe.metric)
        shares = allocation.shares(shapes_of(self.store.model), score, self.recipe.target)
        self.tell("shares", dict(shares))
        return shares

    def prune_block(self, block: str, module: nn.Module, lesson: Lesson | None) -> None:
        """Mask an open block's layers, update their weights and write them if they are not yet.

        Args:
            lesson: What the block is trained on, if it is.
        """
        self.store.finish()  # the block before it does not wait in memory beside these scores
        weights: dict[str, Tensor] = {}
        for layer in layers_of_block(block, module):
            name, removal = next(self.removals)
            assert name == layer, (name, layer)
            if block not in self.store.written:
                weights[layer] = self._changed(layer, removal)
            self._forget(layer)
        if not weights:
            return
        if self.recipe.training and lesson:
            weights, errors = self.recipe.training(block, module, weights, lesson)
            self.tell(block, dict(errors))
        self.store.write(block, weights)

    def _changed(self, layer: str, removal: Removal) -> Tensor:
        """Return a layer's new weight: its mask refined, what stays updated."""
        recipe, dense = self.recipe, self.store.dense(layer)
        gram = self._found(layer, frozenset({GRAM}), self.behind).get(GRAM)
        if recipe.refine and isinstance(removal, Tensor) and gram is not None:
            removal = recipe.refine(dense, removal, gram)
        if recipe.update and gram is not None:
            return recipe.update(dense, removal, gram)
        assert isinstance(removal, Tensor)
        return _zeroed(dense, removal)

    def _score(self, layer: str) -> Tensor:
        kept = self.kept_scores
        scores = kept.get(layer) if kept is not None else None
        if scores is None:
            scores = self._score_by(self.recipe.metric, layer)
            if kept is not None:
                kept[layer] = scores
        return scores

    def _score_by(self, metric: Metric, layer: str) -> Tensor:
        statistics = self._found(layer, metric.leaves, self.statistics)
        if self.recipe.sequential:
            statistics |= self._found(layer, metric.leaves, self.behind)
        return score_layer(metric, layer, self.store.weight(layer), statistics)

    def _found(self, layer: str, leaves: frozenset[str], place: Offload) -> dict[str, Tensor]:
        """Return a layer's statistics by leaf; one that is missing is reported by the metric."""
        keys = {leaf: f"{leaf}/{layer}" for leaf in leaves}
        device = self.store.device
        return {leaf: place[key].to(device) for leaf, key in keys.items() if key in place}

    def _forget(self, layer: str) -> None:
        recipe = self.recipe
        for leaf in recipe.dense_leaves | recipe.pruned_leaves:
            self.behind.pop(f"{leaf}/{layer}", None)
            if self.forgets:
                self.statistics.pop(f"{leaf}/{layer}", None)


def _zeroed(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where a mask is True and the same bits elsewhere."""
    # The bits, so that no NaN is computed with; numpy has no bfloat16.
    integers = torch.int16 if weight.element_size() == 2 else torch.int32
    bits, mask = weight.view(integers), mask.to(weight.device)
    if weight.device.type == "cpu":
        zeroed = torch.empty_like(bits, memory_format=torch.contiguous_format)
        zero_marked(bits.numpy(), mask.contiguous().numpy(), zeroed.numpy())
        return zeroed.view(weight.dtype)
    return torch.mul(bits, ~mask).view(weight.dtype)
