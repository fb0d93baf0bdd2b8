"""Prune a model, or collect its statistics: the walk that runs the passes over its blocks.

The search scores and masks its candidates with the same code.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunevolve.pruning.allocation import Shapes
from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.compiled import zero_marked
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import DegenerateScores, Target
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import decoder_blocks, layers_of_block, linear_layers
from prunevolve.pruning.passes import Advance, Collect, Differentiate, Pass, Step, passes_of
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.recipe import Recipe, Removal, score_layer
from prunevolve.pruning.statistics import GRAM, STATISTICS, Statistics, exact_fp32, need_backward
from prunevolve.pruning.store import Store, all_layers
from prunevolve.pruning.stream import Stream, Texts

Tell = Callable[[str, JsonObject], object]
"""Called with a kind of something that was found out, and with it by block or layer."""


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
            first block is pruned; with `training` and a block's errors by part; with `damping` and
            how many times that of a layer's Gram matrix grew, if it did.

    Raises:
        DegenerateScores: If a layer's scores are not finite or constant, or its Gram matrix has
            no factor.
        ValueError: If n:m does not divide a layer.
        OSError: If a disk is full.
    """
    check_layers(store.model, recipe.target)
    walk = _Walk(
        store,
        texts,
        {} if states is None else states,
        {} if statistics is None else statistics,
        recipe.dense_terminals,
        on_progress,
        recipe=recipe,
        forgets=statistics is None,
        kept_scores=kept_scores,
        tell=tell,
    )
    try:
        walk.run(passes_of(recipe, frozenset().union(*map(walk.missing, store.blocks))))
    finally:
        walk.removals = iter(())  # which refer to the walk: its scores go now, not some day
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


def collect(
    store: Store,
    windows: Tensor,
    terminals: frozenset[str],
    on_progress: Progress = unwatched,
    keep: Callable[[Statistics], dict[str, Tensor]] = Statistics.to_tensors,
) -> Statistics:
    """Collect statistics of the dense model; its weights are not changed.

    Args:
        windows: Token ids, (N, T); one forward pass each, and a backward pass if needed.
        terminals: The statistics to collect; terminals that need no calibration are ignored.
        keep: Maps each block's statistics, once complete, to what is kept of them.
    """
    terminals &= STATISTICS
    gradients = need_backward(terminals)
    passes = [Pass("forward", (Collect(terminals - gradients),), keeps_inputs=bool(gradients))]
    passes += [Pass("backward", (Differentiate(gradients),))] if gradients else []
    collected: dict[str, Tensor] = {}
    if terminals:
        _Walk(store, Texts(windows), {}, collected, terminals, on_progress, keep).run(tuple(passes))
    order = [f"{terminal}/{name}" for terminal in sorted(terminals) for name in all_layers(store)]
    return Statistics.from_tensors({key: collected[key] for key in order if key in collected})


@dataclass
class _Walk:
    """Runs passes over the blocks, one after the other.

    Attributes:
        states: Where hidden states and gradients are put aside.
        statistics: Where statistics of the dense model go, by `G/layer`.
        terminals: Those that are wanted.
        keep: Maps a block's statistics to what is kept of them.
        recipe: How blocks are pruned; None if they are not.
        forgets: Whether a layer's statistics are dropped once it is pruned.
        behind: Statistics of inputs that passed pruned blocks, by `X/layer`.
        removals: Layer names and what goes of them, in the order in which they are pruned.
    """

    store: Store
    texts: Texts
    states: Offload
    statistics: Offload
    terminals: frozenset[str]
    on_progress: Progress
    keep: Callable[[Statistics], dict[str, Tensor]] = Statistics.to_tensors
    recipe: Recipe | None = None
    forgets: bool = True
    kept_scores: MutableMapping[str, Tensor] | None = None
    tell: Tell = lambda name, value: None
    behind: dict[str, Tensor] = field(default_factory=dict)
    removals: Iterator[tuple[str, Removal]] = field(default_factory=lambda: iter(()))
    _streams: dict[str, Stream] = field(default_factory=dict)

    @exact_fp32()
    def run(self, passes: tuple[Pass, ...]) -> None:
        """Run passes in order."""
        selected = False
        backward = any(one.keeps_inputs for one in passes)
        with _frozen(self.store.model) if backward else nullcontext():
            for one in passes:
                order = [*self.store.blocks]
                if one.name == "backward":
                    order.reverse()
                if self.recipe and (one.name == "threshold" or (one.prunes and not selected)):
                    self._select(self.recipe, order)
                    selected = True
                if one.name != "threshold":
                    self._run(one, order)

    def _run(self, one: Pass, order: list[str]) -> None:
        store, recipe = self.store, self.recipe
        self.on_progress(one.name, 0, len(order))
        self._enter(one)
        dense = [step for step in one.dense if step.stream in self._streams]
        pruned = [self._streams[step.stream] for step in one.pruned if step.stream in self._streams]
        for done, (block, then) in enumerate(zip(order, [*order[1:], None], strict=True), 1):
            i = store.blocks.index(block)
            to_prune = bool(one.prunes) and not self.is_done(block)
            is_new = to_prune and block not in store.written
            if dense or to_prune:
                with store.open_dense(block, then) as module:
                    for step in dense:
                        self._do(step, i, block, module)
                    if to_prune and recipe:
                        self._prune_block(recipe, i, block, module)
                    for stream in pruned if is_new else []:
                        stream.advance(i, module)
            if pruned and not is_new:
                with store.open(block) as module:
                    for stream in pruned:
                        stream.advance(i, module)
            self.on_progress(one.name, done, len(order))
        self._leave(one)

    def _enter(self, one: Pass) -> None:
        names = [name for name in one.enters if len(self.texts.by_stream(name))]
        with self.store.outside() if names else nullcontext():
            for name in names:
                kept = one.keeps_inputs and name == "calibration"
                self._streams[name] = Stream.enter(self.store, name, self.texts, self.states, kept)

    def _leave(self, one: Pass) -> None:
        """Measure, differentiate or delete what has left the last block, or gradients the first."""
        with self.store.outside() if self._streams else nullcontext():
            for name, stream in list(self._streams.items()):
                if name in self.texts.evaluations:
                    stream.end(self.store, self.texts.measure)
                elif one.keeps_inputs:
                    stream.enter_gradients(self.store)
                    continue
                else:
                    stream.drop(0 if one.name == "backward" else len(self.store.blocks))
                del self._streams[name]

    def _do(self, step: Step, i: int, block: str, module: nn.Module) -> None:
        stream = self._streams[step.stream]
        match step:
            case Advance():
                stream.advance(i, module)
            case Collect(terminals, behind=True):
                if block not in self.store.written:
                    found = stream.collect(i, block, module, terminals, moves=False)
                    self.behind.update(found.to_tensors())
            case Collect(terminals):
                wanted = terminals & self.missing(block)
                self._keep(stream.collect(i, block, module, wanted, moves=True))
            case Differentiate(terminals):
                wanted = terminals & self.missing(block)
                self._keep(stream.collect_back(i, block, module, wanted))

    def missing(self, block: str) -> frozenset[str]:
        """Return the terminals of the dense model that a block needs and that are not there yet."""
        if self.is_done(block):
            return frozenset()
        layers = self.store.layers[block]
        return frozenset(
            terminal
            for terminal in self.terminals
            if any(f"{terminal}/{layer}" not in self.statistics for layer in layers)
        )

    def _keep(self, statistics: Statistics) -> None:
        """Take a block's statistics; those that wait for a later pass in host memory."""
        recipe = self.recipe
        waits = recipe and (recipe.needs_all_scores or recipe.sequential or recipe.follows)
        for key, tensor in self.keep(statistics).items():
            self.statistics[key] = tensor.cpu() if waits or not self.forgets else tensor

    def is_done(self, block: str) -> bool:
        """Whether a block's scores are no longer needed; one threshold needs all to the end."""
        written = self.store.written
        needs_all = self.recipe is not None and self.recipe.needs_all_scores
        return block in written and (not needs_all or written.issuperset(self.store.blocks))

    def _select(self, recipe: Recipe, blocks: list[str]) -> None:
        """Decide what goes of each layer: now, or when it is due if the group allows that."""
        store, target = self.store, recipe.target
        left = {block: store.layers[block] for block in blocks if not self.is_done(block)}
        shares: Mapping[str, float] = {}
        if left and recipe.allocation:
            score = partial(self._score_by, recipe.allocation.metric or recipe.metric)
            shares = recipe.allocation.shares(shapes_of(store.model), score, target)
            self.tell("shares", dict(shares))
        fractions = {
            layer: shares.get(layer, target.sparsity)
            for layers in left.values()
            for layer in layers
        }
        if recipe.own_masks:
            self.removals = iter(fractions.items())
        else:
            self.removals = target.group.select(partial(self._score, recipe.metric), fractions)

    def _prune_block(self, recipe: Recipe, i: int, block: str, module: nn.Module) -> None:
        """Mask an open block's layers, update their weights and write them if they are not yet."""
        self.store.finish()  # the block before it does not wait in memory beside these scores
        weights: dict[str, Tensor] = {}
        for layer in layers_of_block(block, module):
            name, removal = next(self.removals)
            assert name == layer, (name, layer)
            if block not in self.store.written:
                weights[layer] = self._changed(recipe, layer, removal)
            for terminal in self.terminals | recipe.pruned_terminals:
                self.behind.pop(f"{terminal}/{layer}", None)
                if self.forgets:
                    self.statistics.pop(f"{terminal}/{layer}", None)
        if not weights:
            return
        if recipe.training and "targets" in self._streams:
            lesson = self._streams["calibration"].lesson(i, self._streams["targets"])
            weights, errors = recipe.training(block, module, weights, lesson)
            self.tell("training", {block: dict(errors)})
        self.store.write(block, weights)

    def _changed(self, recipe: Recipe, layer: str, removal: Removal) -> Tensor:
        """Return a layer's new weight: its mask refined, what stays updated."""
        dense, gram = self.store.dense(layer), f"{GRAM}/{layer}"
        if recipe.refine and isinstance(removal, Tensor):
            removal = recipe.refine(dense, removal, self.behind[gram])
        if recipe.update:
            try:
                weight, grown = recipe.update(dense, removal, self.behind[gram])
            except DegenerateScores as error:
                raise DegenerateScores(f"layer {layer}: {error}") from error
            if grown:
                self.tell("damping", {layer: grown})
            return weight
        assert isinstance(removal, Tensor)
        return _zeroed(dense, removal)

    def _score(self, metric: Metric, layer: str) -> Tensor:
        kept = self.kept_scores
        scores = kept.get(layer) if kept is not None else None
        if scores is None:
            scores = self._score_by(metric, layer)
            if kept is not None:
                kept[layer] = scores
        return scores

    def _score_by(self, metric: Metric, layer: str) -> Tensor:
        statistics = self._found(layer, metric.terminals, self.statistics)
        if self.recipe and self.recipe.sequential:
            statistics |= self._found(layer, metric.terminals, self.behind)
        return score_layer(metric, layer, self.store.weight(layer), statistics)

    def _found(self, layer: str, terminals: frozenset[str], place: Offload) -> dict[str, Tensor]:
        """Return a layer's statistics by terminal; the metric reports one that is missing."""
        keys = {terminal: f"{terminal}/{layer}" for terminal in terminals}
        device = self.store.device
        return {terminal: place[key].to(device) for terminal, key in keys.items() if key in place}


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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, only watched parameters take part in a backward pass."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
