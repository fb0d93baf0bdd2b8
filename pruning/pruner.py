"""Prune a model: collect statistics, score, select, update, write, in as few walks as it takes.

`one-shot` takes all statistics from the dense model. `sequential` collects those of a block's
inputs from windows that passed the already pruned blocks before it, as the Pruner-Zero release does
for X; gradients are those of the dense model in both. The search scores and masks its candidates
with the same code.
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.leaves import Statistics, made_of, need_backward
from pruning.masks import Masks, Target
from pruning.models import layers_of_block, linear_layers
from pruning.progress import Progress, unwatched
from pruning.recipe import Recipe, score_layer
from pruning.spool import Spool
from pruning.store import Store, in_turn
from pruning.walk import Stream, Texts, walk_dense


def prune(
    store: Store,
    recipe: Recipe,
    texts: Texts,
    states: Spool | None = None,
    statistics: Spool | None = None,
    on_progress: Progress = unwatched,
    kept_scores: MutableMapping[str, Tensor] | None = None,
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
    )
    try:
        if pruning.needs_dense_walk:
            pruning.walk_dense()
        pruning.walk_and_prune()
    finally:
        store.finish()


def check_layers(model: PreTrainedModel, target: Target) -> None:
    """Raise ValueError if n:m does not divide a layer; called before any work."""
    for name, layer in linear_layers(model).items():
        target.group.check_layer(name, layer.in_features)


@dataclass
class _Pruning:
    """One pruning in progress.

    Attributes:
        statistics: Of the dense model, by `G/layer`.
        forgets: Whether a layer's statistics are dropped once it is pruned.
        sequential_statistics: Of inputs that passed pruned blocks, by `X/layer`.
    """

    store: Store
    recipe: Recipe
    texts: Texts
    states: Spool
    statistics: Spool
    forgets: bool
    on_progress: Progress
    kept_scores: MutableMapping[str, Tensor] | None
    sequential_statistics: dict[str, Tensor] = field(default_factory=dict)

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
            pruned = enter("pruned")
            calibration = enter("calibration") if self._collects_inputs() else None
        follow = [s for s in (pruned, calibration if recipe.sequential else None) if s]
        masks = self.masks(store.blocks)
        for i, (block, then) in enumerate(in_turn(store.blocks)):
            is_new = False
            if dense or calibration or not self._is_done(block):
                with store.open_dense(block, then) as module:
                    if dense:
                        dense.advance(i, module)
                    if calibration:
                        self._collect(calibration, i, block, module)
                    is_new = self.prune_block(block, module, masks)
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
        if calibration:
            calibration.drop(len(store.blocks))

    def masks(self, blocks: Iterable[str]) -> Masks:
        """Yield the masks of all layers of the blocks that are not done, each computed when due."""
        layers = [
            layer
            for block in blocks
            if not self._is_done(block)
            for layer in self.store.layers[block]
        ]
        target = self.recipe.target
        fractions = self.recipe.allocation.fractions(layers, self._score, target.sparsity)
        return target.group.select(self._score, fractions)

    def prune_block(self, block: str, module: nn.Module, masks: Masks) -> bool:
        """Mask an open block's layers, update their weights and write them.

        Args:
            masks: Its next mask is that of the block's first layer.

        Returns:
            Whether the block was pruned; False if it was done before.
        """
        if self._is_done(block):
            return False
        self.store.finish()  # the block before it does not wait in memory beside these scores
        weights = {}
        for layer in layers_of_block(block, module):
            name, mask = next(masks)
            assert name == layer, (name, layer)
            if block not in self.store.written:
                dense, statistics = self.store.dense(layer), self._statistics(layer)
                weights[layer] = self.recipe.update.apply(dense, mask, statistics)
            self._forget(layer)
        if weights:
            self.store.write(block, weights)
        return bool(weights)

    def _score(self, layer: str) -> Tensor:
        kept = self.kept_scores
        if kept is not None and layer in kept:
            return kept[layer]
        weight = self.store.weight(layer)
        scores = score_layer(self.recipe.metric, layer, weight, self._statistics(layer))
        if kept is not None:
            kept[layer] = scores
        return scores

    def _missing(self, block: str) -> frozenset[str]:
        """Return the leaves of the dense model that a block needs and that are still missing."""
        if self._is_done(block):
            return frozenset()
        leaves = self.recipe.leaves
        if self.recipe.sequential:
            leaves -= made_of(leaves, "inputs")
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

    def _collects_inputs(self) -> bool:
        """Whether the calibration windows pass the blocks while these are pruned."""
        inputs = made_of(self.recipe.leaves, "inputs")
        if self.recipe.sequential:
            return bool(inputs)
        missing = any(self._missing(block) & inputs for block in self.store.blocks)
        return missing and not self.needs_dense_walk

    def _collect(self, calibration: Stream, i: int, block: str, module: nn.Module) -> None:
        """Collect the statistics of a block's inputs.

        The windows move on to the next block, unless the block has to be pruned before they do.
        """
        leaves = made_of(self.recipe.leaves, "inputs")
        if block in self.store.written:
            leaves = frozenset()
        elif not self.recipe.sequential:
            leaves &= self._missing(block)
        sequential = self.recipe.sequential
        place = self.sequential_statistics if sequential else self.statistics
        statistics = calibration.collect(i, block, module, leaves, moves=not sequential)
        place.update(statistics.to_tensors())

    def _keep(self, statistics: Statistics) -> None:
        # Statistics for a later walk wait in host memory, not in a GPU's.
        waits = not self.forgets or self.recipe.statistics_wait
        for key, tensor in statistics.to_tensors().items():
            self.statistics[key] = tensor.cpu() if waits else tensor

    def _statistics(self, layer: str) -> dict[str, Tensor]:
        """Return a layer's statistics by leaf; one that is missing is reported by the metric."""
        by_leaf = {}
        for leaf in self.recipe.leaves:
            key = f"{leaf}/{layer}"
            fresh = key in self.sequential_statistics
            place = self.sequential_statistics if fresh else self.statistics
            if key in place:
                by_leaf[leaf] = place[key].to(self.store.device)
        return by_leaf

    def _forget(self, layer: str) -> None:
        for leaf in self.recipe.leaves:
            self.sequential_statistics.pop(f"{leaf}/{layer}", None)
            if self.forgets:
                self.statistics.pop(f"{leaf}/{layer}", None)
