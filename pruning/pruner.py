"""Prune a model: collect statistics, score, select, update, write, in as few walks as it takes.

`one-shot` takes all statistics from the dense model. `sequential` collects those of a block's
inputs from windows that passed the already pruned blocks before it, as the Pruner-Zero release does
for X; gradients are those of the dense model in both. The search scores and masks its candidates
with the same code.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.calibration import statistics_of, watched_inputs
from pruning.leaves import Statistics, made_of, need_backward
from pruning.masks import Target, select
from pruning.models import layers_of_block, linear_layers
from pruning.progress import Progress
from pruning.recipe import KeptScores, LayerScores, Recipe
from pruning.spool import Spool
from pruning.store import Store, all_layers, in_turn
from pruning.walk import Stream, Texts, depth_of, walk_dense


def prune(
    store: Store,
    recipe: Recipe,
    texts: Texts,
    states: Spool | None = None,
    statistics: Spool | None = None,
    on_progress: Progress = lambda stage, done, total: None,
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
        {} if states is None else states,
        {} if statistics is None else statistics,
        forgets=statistics is None,
        on_progress=on_progress,
        kept_scores=kept_scores,
    )
    try:
        if pruning.decides != "forward":
            pruning.walk_dense()
        pruning.walk_and_write()
    finally:
        # The iterator refers to all scores and, through their statistics, to this object: a cycle,
        # which would stay in memory until Python looks for cycles.
        pruning.masks = None
        store.finish()


def check_layers(model: PreTrainedModel, target: Target) -> None:
    """Raise ValueError if n:m does not divide a layer; called before any work."""
    for name, layer in linear_layers(model).items():
        target.group.check_layer(name, layer.in_features)


@dataclass
class _Pruning:
    """One pruning in progress."""

    store: Store
    recipe: Recipe
    texts: Texts
    states: Spool
    kept: Spool
    forgets: bool
    on_progress: Progress
    kept_scores: MutableMapping[str, Tensor] | None
    fresh: dict[str, Tensor] = field(default_factory=dict)  # of inputs that passed pruned blocks
    masks: Iterator[tuple[str, Tensor]] | None = None
    decides: str = ""

    def __post_init__(self) -> None:
        # Nothing is left to do on the way back if all gradients were kept by an earlier run.
        wanted = frozenset().union(*(self._wanted(block) for block in self.store.blocks))
        back = self.recipe.decides == "backward" and not need_backward(wanted)
        self.decides = "forward" if back else self.recipe.decides

    def walk_dense(self) -> None:
        """Collect the dense model's statistics; write blocks on the way back where possible."""
        walk_dense(
            self.store,
            self.texts,
            {block: self._wanted(block) for block in self.store.blocks},
            self.states,
            self._keep,
            self._decide if self.decides == "backward" else lambda block, module: None,
            self.on_progress,
        )

    def walk_and_write(self) -> None:
        """Walk forward: write each block not yet written, and run the texts through it."""
        store, recipe = self.store, self.recipe
        self.on_progress("prune", 0, len(store.blocks))
        first = self.decides == "forward"
        inputs = made_of(recipe.leaves, "inputs")
        missing = any(self._wanted(block) & inputs for block in store.blocks)
        collects = bool(inputs) if recipe.sequential else first and missing
        with store.outside():
            dense = self._enter("dense") if first else None
            pruned = self._enter("pruned")
            calibration = self._enter("calibration") if collects else None
        after = [s for s in (pruned, calibration if recipe.sequential else None) if s]
        for i, (block, then) in enumerate(in_turn(store.blocks)):
            fresh = False
            if dense or calibration or not self._is_done(block):
                with store.open_dense(block, then) as module:
                    if dense:
                        dense.advance(i, module)
                    if calibration:
                        self._collect(calibration, i, block, module)
                    fresh = self._decide(block, module)
                    _advance(after if fresh else [], i, module)
            if after and not fresh:
                with store.open(block) as module:
                    _advance(after, i, module)
            self.on_progress("prune", i + 1, len(store.blocks))
        with store.outside():
            for stream in filter(None, (dense, pruned)):
                stream.end(store, self.texts.measure)
        if calibration:
            calibration.drop(len(store.blocks))

    def _enter(self, name: str) -> Stream | None:
        windows = self.texts.by_stream(name)
        return Stream.enter(self.store, name, windows, self.states) if len(windows) else None

    def _wanted(self, block: str) -> frozenset[str]:
        """Return the leaves of the dense model that a block needs and that are still missing."""
        if self._is_done(block):
            return frozenset()
        leaves = self.recipe.leaves
        if self.recipe.sequential:
            leaves -= made_of(leaves, "inputs")
        layers = self.store.layers[block]
        return frozenset(
            leaf for leaf in leaves if any(f"{leaf}/{layer}" not in self.kept for layer in layers)
        )

    def _is_done(self, block: str) -> bool:
        """Whether a block's scores are no longer needed; one threshold needs all to the end."""
        written = self.store.written
        return block in written and (
            not self.recipe.needs_all_scores or written.issuperset(self.store.blocks)
        )

    def _collect(self, calibration: Stream, i: int, block: str, module: nn.Module) -> None:
        """Collect the statistics of a block's inputs.

        The windows move on to the next block, unless the block has to be pruned before they do.
        """
        leaves = made_of(self.recipe.leaves, "inputs")
        if block in self.store.written:
            leaves = frozenset()
        elif not self.recipe.sequential:
            leaves &= self._wanted(block)
        with watched_inputs(layers_of_block(block, module), leaves, module) as sums:
            move = calibration.look if self.recipe.sequential else calibration.advance
            move(i, module)
        kept = self.fresh if self.recipe.sequential else self.kept
        depth = depth_of(i, self.store)
        kept.update(statistics_of(sums, calibration.windows, depth).to_tensors())

    def _keep(self, statistics: Statistics) -> None:
        # Statistics for a later walk wait in host memory, not in a GPU's.
        waits = not self.forgets or self.decides == "last"
        for key, tensor in statistics.to_tensors().items():
            self.kept[key] = tensor.cpu() if waits else tensor

    def _decide(self, block: str, module: nn.Module) -> bool:
        """Score, select, update and write a block unless it is done; return whether it was written.

        The open block then has its new weights.
        """
        if self._is_done(block):
            return False
        layers = layers_of_block(block, module)
        masks = self._all_masks() if self.recipe.needs_all_scores else self._masks_of(layers)
        weights = {}
        for name in layers:
            layer, mask = next(masks)
            assert layer == name, (layer, name)
            if block not in self.store.written:
                dense = self.store.dense(name)
                weights[name] = self.recipe.update.apply(dense, mask, self._statistics(name))
            self._forget(name)
        if weights:
            self.store.write(block, weights)
        return bool(weights)

    def _masks_of(self, layers: Mapping[str, nn.Linear]) -> Iterator[tuple[str, Tensor]]:
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        return self._select(weights)

    def _all_masks(self) -> Iterator[tuple[str, Tensor]]:
        """Return the single iterator over all layers' masks, in layer order."""
        if self.masks is None:
            self.masks = self._select(_DenseWeights(self.store))
        return self.masks

    def _select(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        scores: Mapping[str, Tensor]
        scores = LayerScores(self.recipe.metric, weights, self._statistics)
        if self.kept_scores is not None:
            scores = KeptScores(scores, self.kept_scores)
        fractions = self.recipe.allocation.fractions(scores, self.recipe.target.sparsity)
        return select(scores, self.recipe.target, fractions)

    def _statistics(self, layer: str) -> dict[str, Tensor]:
        """Return a layer's statistics by leaf; one that is missing is reported by the metric."""
        by_leaf = {}
        for leaf in self.recipe.leaves:
            key = f"{leaf}/{layer}"
            part = self.fresh if key in self.fresh else self.kept
            if key in part:
                by_leaf[leaf] = part[key].to(self.store.device)
        return by_leaf

    def _forget(self, layer: str) -> None:
        for leaf in self.recipe.leaves:
            self.fresh.pop(f"{leaf}/{layer}", None)
            if self.forgets:
                self.kept.pop(f"{leaf}/{layer}", None)


def _advance(streams: Sequence[Stream], block: int, module: nn.Module) -> None:
    for stream in streams:
        stream.advance(block, module)


class _DenseWeights(Mapping[str, Tensor]):
    """All layers' dense weights by name, each read on access."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names = all_layers(store)

    def __getitem__(self, name: str) -> Tensor:
        return self._store.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
