"""Prune a model: collect statistics, score, select, update, write, in as few walks as it takes.

`one-shot` takes all statistics from the dense model. `sequential` collects those of a block's
inputs from windows that passed the already pruned blocks before it, as the Pruner-Zero release does
for X; gradients are those of the dense model in both. The search scores and masks its candidates
with the same code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import decoder_blocks, layers_of_block, linear_layers
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.recipe import Lesson, Recipe, Removal, Shapes, score_layer
from prunevolve.pruning.spool import Spool
from prunevolve.pruning.statistics import Statistics, need_backward, need_forward
from prunevolve.pruning.store import Store, in_turn
from prunevolve.pruning.walk import Stream, Texts, walk_dense

Removals = Iterator[tuple[str, Removal]]
"""Layer names and what goes of them, in order."""

Tell = Callable[[str, JsonObject], object]
"""Called with the name of something that was found out, and with it."""


def prune(
    store: Store,
    recipe: Recipe,
    texts: Texts,
    states: Spool | None = None,
    statistics: Spool | None = None,
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
        ValueError: If the metric cannot rank weights, n:m does not divide a layer, or `sequential`
            is combined with a model-wide threshold, which needs every layer's scores before the
            first layer is pruned.
        OSError: If a disk is full.
    """
    recipe.check()
    check_layers(store.model, recipe.target)
    pruning = _Pruning(
        store,
        recipe,
        texts,
        states={} if states is None else states,
        statistics={} if statistics is None else statistics,
        forgets=statistics is None,
        on_progress=on_progress,
        kept_scores=kept_scores,
        tell=tell,
    )
    try:
        if pruning.needs_dense_walk:
            pruning.walk_dense()
        pruning.walk_and_prune()
    finally:
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


def found_statistics(
    layer: str, leaves: frozenset[str], place: Spool, device: torch.device
) -> dict[str, Tensor]:
    """Return a layer's statistics by leaf; one that is missing is reported by the metric."""
    keys = {leaf: f"{leaf}/{layer}" for leaf in leaves}
    return {leaf: place[key].to(device) for leaf, key in keys.items() if key in place}


@dataclass
class _Pruning:
    """One pruning in progress.

    Attributes:
        statistics: Of the dense model, by `G/layer`.
        forgets: Whether a layer's statistics are dropped once it is pruned.
        of_pruned: Statistics of inputs that passed pruned blocks, by `X/layer`.
    """

    store: Store
    recipe: Recipe
    texts: Texts
    states: Spool
    statistics: Spool
    forgets: bool
    on_progress: Progress
    kept_scores: MutableMapping[str, Tensor] | None
    tell: Tell
    of_pruned: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Nothing is left to do on the way back if all gradients were kept by an earlier run.
        wanted = frozenset().union(*(self._missing(block) for block in self.store.blocks))
        self.prunes_on_the_way_back = self.recipe.prunes_on_the_way_back and bool(
            need_backward(wanted)
        )
        self.needs_dense_walk = self.prunes_on_the_way_back or self.recipe.statistics_wait

    def walk_dense(self) -> None:
        """Collect the dense model's statistics; prune blocks on the way back where possible."""
        visit = None
        if self.prunes_on_the_way_back:
            visit = partial(self.prune_block, masks=self.masks(reversed(self.store.blocks)))
        walk_dense(
            self.store,
            self.texts,
            wanted={block: self._missing(block) for block in self.store.blocks},
            states=self.states,
            keep=self._keep,
            visit=visit,
            on_progress=self.on_progress,
        )

    def walk_and_prune(self) -> None:
        """Walk forward: prune each block not yet pruned, and run the texts through it."""
        store, recipe = self.store, self.recipe
        self.on_progress("prune", 0, len(store.blocks))
        with store.outside():
            enter = partial(Stream.enter, store, texts=self.texts, spool=self.states)
            dense = None if self.needs_dense_walk else enter("dense")
            targets = enter("targets") if recipe.training else None
            pruned = enter("pruned")
            calibration = enter("calibration") if self._needs_windows() else None
        lead = [stream for stream in (dense, targets) if stream]
        follow = [s for s in (pruned, calibration if recipe.follows else None) if s]
        masks = self.masks(store.blocks)
        for i, (block, then) in enumerate(in_turn(store.blocks)):
            is_new = False
            if lead or calibration or not self._is_done(block):
                with store.open_dense(block, then) as module:
                    for stream in lead:
                        stream.advance(i, module)
                    if calibration:
                        self._collect(calibration, i, block, module)
                    lesson = calibration.lesson(i, targets) if calibration and targets else None
                    is_new = self.prune_block(block, module, masks, lesson)
                    for stream in follow if is_new else []:
                        stream.advance(i, module)
            if follow and not is_new:
                with store.open(block) as module:
                    for stream in follow:
                        stream.advance(i, module)
            self.on_progress("prune", i + 1, len(store.blocks))
        with store.outside():
            for stream in filter(None, (dense, pruned)):
                stream.end(store, self.texts.measure)
        for stream in filter(None, (calibration, targets)):
            stream.drop(len(store.blocks))

    def masks(self, blocks: Iterable[str]) -> Removals:
        """Yield what goes of all layers of the blocks that are not done, each when it is due."""
        store, target = self.store, self.recipe.target
        left = {block: store.layers[block] for block in blocks if not self._is_done(block)}
        shares = self._shares() if left else {}
        fractions = {
            layer: shares.get(layer, target.sparsity)
            for layers in left.values()
            for layer in layers
        }
        if self.recipe.update.chooses:
            return iter(fractions.items())
        return target.group.select(self._score, fractions)

    def _shares(self) -> Mapping[str, float]:
        """Return what the allocation gives each layer; nothing without one."""
        allocation = self.recipe.allocation
        if allocation is None:
            return {}
        score = partial(self._score_by, allocation.metric or self.recipe.metric)
        shares = allocation.shares(shapes_of(self.store.model), score, self.recipe.target)
        self.tell("shares", dict(shares))
        return shares

    def prune_block(
        self, block: str, module: nn.Module, masks: Removals, lesson: Lesson | None = None
    ) -> bool:
        """Mask an open block's layers, update their weights and write them.

        Args:
            masks: Its next mask is that of the block's first layer.
            lesson: What the block is trained on, if it is.

        Returns:
            Whether the block was pruned; False if it was done before.
        """
        if self._is_done(block):
            return False
        self.store.finish()  # the block before it does not wait in memory beside these scores
        weights: dict[str, Tensor] = {}
        for layer in layers_of_block(block, module):
            name, removal = next(masks)
            assert name == layer, (name, layer)
            if block not in self.store.written:
                weights[layer] = self._changed(layer, removal)
            self._forget(layer)
        if weights:
            if self.recipe.training and lesson:
                trained, errors = self.recipe.training(block, module, weights, lesson)
                self.tell(block, dict(errors))
                weights = dict(trained)
            self.store.write(block, weights)
        return bool(weights)

    def _changed(self, layer: str, removal: Removal) -> Tensor:
        """Return a layer's new weight: its mask refined, what stays updated."""
        recipe, dense = self.recipe, self.store.dense(layer)
        device = self.store.device
        statistics = found_statistics(layer, recipe.pruned_leaves, self.of_pruned, device)
        if recipe.refinement and isinstance(removal, Tensor):
            removal = recipe.refinement.apply(dense, removal, statistics)
        return recipe.update.apply(dense, removal, statistics)

    def _score(self, layer: str) -> Tensor:
        kept = self.kept_scores
        scores = kept.get(layer) if kept is not None else None
        if scores is None:
            scores = self._score_by(self.recipe.metric, layer)
            if kept is not None:
                kept[layer] = scores
        return scores

    def _score_by(self, metric: Metric, layer: str) -> Tensor:
        device = self.store.device
        statistics = found_statistics(layer, metric.leaves, self.statistics, device)
        if self.recipe.sequential:
            statistics |= found_statistics(layer, metric.leaves, self.of_pruned, device)
        weight = self.store.weight(layer)
        return score_layer(metric, layer, weight, statistics)

    def _missing(self, block: str) -> frozenset[str]:
        """Return the leaves of the dense model that a block needs and that are still missing."""
        if self._is_done(block):
            return frozenset()
        leaves = self.recipe.dense_leaves
        layers = self.store.layers[block]
        return frozenset(
            leaf
            for leaf in leaves
            if any(f"{leaf}/{layer}" not in self.statistics for layer in layers)
        )

    def _is_done(self, block: str) -> bool:
        """Whether a block's scores are no longer needed; one threshold needs all to the end."""
        written = self.store.written
        return block in written and (
            not self.recipe.needs_all_scores or written.issuperset(self.store.blocks)
        )

    def _needs_windows(self) -> bool:
        """Whether the calibration windows pass the blocks while these are pruned."""
        if self.recipe.follows:
            return True
        inputs = need_forward(self.recipe.dense_leaves)
        missing = any(self._missing(block) & inputs for block in self.store.blocks)
        return missing and not self.needs_dense_walk

    def _collect(self, calibration: Stream, i: int, block: str, module: nn.Module) -> None:
        """Collect the statistics of a block's inputs.

        The windows move on to the next block, unless the block has to be pruned before they do.
        """
        follows = self.recipe.follows
        leaves = need_forward(self._missing(block))
        if follows:
            leaves = self.recipe.pruned_leaves
        if block in self.store.written:
            leaves = frozenset()
        if follows and not leaves:
            return
        place = self.of_pruned if follows else self.statistics
        statistics = calibration.collect(i, block, module, leaves, moves=not follows)
        place.update(statistics.to_tensors())

    def _keep(self, statistics: Statistics) -> None:
        # Statistics for a later walk wait in host memory, not in a GPU's.
        waits = not self.forgets or self.recipe.statistics_wait
        for key, tensor in statistics.to_tensors().items():
            self.statistics[key] = tensor.cpu() if waits else tensor

    def _forget(self, layer: str) -> None:
        for leaf in self.recipe.leaves:
            self.of_pruned.pop(f"{leaf}/{layer}", None)
            if self.forgets:
                self.statistics.pop(f"{leaf}/{layer}", None)
