"""Prune a model, or collect its statistics."""

from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.masks import Target
from prunevolve.pruning.models import shapes_of
from prunevolve.pruning.passes import Procedure, collecting, passes_of
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.statistics import STATISTICS, Statistics
from prunevolve.pruning.store import Store
from prunevolve.pruning.walk import Keep, Losses, Record, Walk


def prune(
    store: Store,
    procedure: Procedure,
    windows: Mapping[str, Tensor],
    states: Offload | None = None,
    statistics: Offload | None = None,
    on_progress: Progress = unwatched,
    kept_scores: MutableMapping[str, Tensor] | None = None,
    record: Record = lambda name, value: None,
    losses: Losses | None = None,
) -> None:
    """Zero the lowest-scoring weights of a model's decoder blocks, block by block.

    If the procedure is guarded, the losses of windows held back with no update, half of it and all
    of it choose how far weights go from masked to updated: if not all of the way, blocks are mixed.
    Blocks that the store has already written stay as they are. Raises DegenerateScores if a layer's
    scores are not finite or constant, or its Gram matrix has no factor, and OSError if a disk is
    full.

    Args:
        windows: Token ids, (N, T), by what they are for: `calibration`, if there is any;
            `held_back`, without which nothing is guarded; `dense` and `pruned` are measured before
            and after pruning.
        states: Where hidden states are put aside; None for memory.
        statistics: Where statistics of the dense model are put aside, by `G/layer`, and stay;
            those already there are used. None keeps them in memory for as long as they are needed.
        kept_scores: Where all layers' scores are kept, in fp32, for another target; those already
            there are used. None keeps none, and computes them three times for a threshold over the
            whole model.
        record: Called with `training` and a block's errors by part; with `damping` and
            how many times that of a layer's Gram matrix grew, if it did; with `losses` of `dense`
            and of `pruned`; with `guard`, the held-back windows' mean losses, nats per token, and
            the `part` of the way that they choose.
        losses: Measures these.
    """
    check_layers(store.model, procedure.target)
    if "held_back" not in windows:
        procedure = replace(procedure, guarded=False)
    # In host memory, if a later pass or another pruning needs them.
    to_host = procedure.waits or statistics is not None
    walk = Walk(
        store,
        windows,
        procedure.dense_terminals,
        {} if states is None else states,
        {} if statistics is None else statistics,
        on_progress,
        keep=lambda key, tensor: tensor.cpu() if to_host else tensor,
        procedure=procedure,
        forgets=statistics is None,
        kept_scores=kept_scores,
        record=record,
        losses=losses,
    )
    try:
        _carry_out(walk, procedure)
    finally:
        walk.removals = None  # which refers to the walk: its scores go now, not some day
        store.finish()


def _carry_out(walk: Walk, procedure: Procedure) -> None:
    """Prune, and mix the blocks if windows held back choose that, or did before a kill."""
    store, part = walk.store, procedure.part
    layers = [layer for of_block in store.layers.values() for layer in of_block]
    dense = {layer: store.dense(layer) for layer in layers if procedure.guarded}
    if part is None:
        walk.run(passes_of(procedure, frozenset().union(*map(walk.missing, store.blocks))))
        store.finish()
        if walk.guard:
            walk.record("guard", walk.guard)
            part = walk.guard["part"]
    if part is not None and part < 1:
        store.mix(dense)
        walk.mix(part)


def check_layers(model: PreTrainedModel, target: Target) -> None:
    """Raise ValueError if the target does not fit the layers; called before any work."""
    target.group.check(shapes_of(model), target.sparsity)


def collect(
    store: Store,
    windows: Tensor,
    terminals: frozenset[str],
    on_progress: Progress = unwatched,
    keep: Keep = lambda key, tensor: tensor,
) -> Statistics:
    """Collect statistics of the dense model on token ids, (N, T); W needs none and is ignored."""
    statistics, terminals = Statistics(), terminals & STATISTICS
    if terminals:
        walk = Walk(store, {"calibration": windows}, terminals, {}, statistics, on_progress, keep)
        walk.run(collecting(terminals))
    return statistics
