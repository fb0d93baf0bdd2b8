"""A bound of what a pruning holds in memory and puts on disk, from a model's shapes.

Sizes are bytes. For each pass the bound adds what is held at one time: libraries, a block, the sums
of its statistics, and the largest of the works on it. Nothing here reads a weight. What cannot fit
is refused before any work.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from prunevolve.pruning.embed_and_head import HEAD_TOKENS
from prunevolve.pruning.leaves import GRAM, LEAVES, STATISTICS, sums_size
from prunevolve.pruning.models import DTYPES, decoder_blocks, layers_of_block, outside_blocks
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.passes import Differentiate, Pass, passes_of
from prunevolve.pruning.recipe import Recipe

GIB = 1 << 30

LIBRARIES = int(0.6 * GIB)
"""What Python, torch and transformers hold before a model is opened."""

_TRAINED_VALUES = 8
"""Values in fp32 for each trained weight: it, its gradient, Adam's two, the best so far, and those
that the passes make of it."""

_SAVED_BY_GRAPH = 18
"""Values of the hidden size, and half as many of the intermediate size, kept for each token."""

Rows = dict[str, int]
"""Bytes by purpose."""


@dataclass(frozen=True)
class Work:
    """What passes a model, and what is computed of it.

    Attributes:
        model: Shapes; its parameters are not looked at.
        dtype: Of the passes, a key of `DTYPES`.
        saved_dtype: Of the pruned weights.
        calibration: Number of windows for statistics, and tokens in each.
        evaluation: Number of windows for perplexity, and tokens that pass at a time.
    """

    model: PreTrainedModel
    recipe: Recipe
    dtype: str
    saved_dtype: str
    calibration: tuple[int, int]
    evaluation: tuple[int, int]

    @property
    def item(self) -> int:
        """Bytes of a value in the passes."""
        return DTYPES[self.dtype].itemsize

    @property
    def layers(self) -> list[list[nn.Linear]]:
        """The prunable layers of each block."""
        return [list(layers_of_block(*x).values()) for x in decoder_blocks(self.model).items()]

    @property
    def blocks(self) -> list[int]:
        """Each block's parameters."""
        blocks = decoder_blocks(self.model).values()
        return [self.item * sum(p.numel() for p in block.parameters()) for block in blocks]

    @property
    def outside(self) -> int:
        """The parameters outside the blocks, tied ones once."""
        return self.item * sum(p.numel() for p in set(outside_blocks(self.model).values()))

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, where no statistics are kept from before."""
        return passes_of(self.recipe, self.recipe.dense_leaves)


def held(one: Pass, work: Work) -> Rows:
    """Return what a pass holds beside the libraries and what was put aside before."""
    sizes = [[layer.weight.numel() for layer in layers] for layers in work.layers]
    largest, whole = max(map(max, sizes)), max(map(sum, sizes))
    scored = 4 * largest * _values(work.recipe)
    if one.name == "threshold":
        return {"scores": scored}
    new = DTYPES[work.saved_dtype].itemsize * whole  # until its shard is written
    backward = any(isinstance(step, Differentiate) for step in one.dense)
    windows = [work.evaluation[1]] + [work.calibration[1]] * bool(one.leaves)
    window = max(work.item * _activations(work.model, tokens, backward) for tokens in windows)
    window += 2 * work.item * largest * backward
    sums = max(sums_size(layers, one.leaves) for layers in work.layers) if one.leaves else 0
    pruning = 0
    if one.prunes:
        grams = GRAM in one.leaves
        pruning = new + max(scored, _update([x for some in work.layers for x in some]) * grams)
    if work.recipe.training and one.prunes:
        trained = work.item * _activations(work.model, work.calibration[1], True)
        pruning = max(pruning, new + 4 * _TRAINED_VALUES * whole + trained)
    block = {"a block": max(work.blocks), "sums": sums, "work": max(window + new, pruning)}
    logits = 3 * 4 * HEAD_TOKENS * work.model.config.get_text_config().vocab_size
    ends = {"embeddings and head": work.outside, "logits": logits, "a shard": new}
    return max(block, ends, key=lambda rows: sum(rows.values()))


def _values(recipe: Recipe) -> int:
    """Return the fp32 values for each weight of a matrix that is scored and masked."""
    nodes = set(recipe.metric.nodes())
    return max(3, 1 + sum(x.shape == MATRIX and x.name not in STATISTICS for x in nodes))


def _update(layers: Sequence[nn.Linear]) -> int:
    """Return what an update takes: two copies of a weight; a Gram matrix, factor and inverses."""
    largest = max(layer.weight.numel() for layer in layers)
    most_inputs = max(layer.in_features for layer in layers)
    return 4 * (2 * largest + 4 * most_inputs**2)


def _activations(model: PreTrainedModel, length: int, backward: bool) -> int:
    """Return the number of values of one window's activations in one block, from above."""
    config = model.config.get_text_config()
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    wide: int = getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0)
    values = length * (_SAVED_BY_GRAPH * hidden + _SAVED_BY_GRAPH // 2 * wide)
    attended = length if backward else min(length, 64)
    return values + 2 * length * attended * heads


def _statistics(work: Work) -> int:
    """Return the size of all layers' statistics that wait for a later pass; they are fp32."""
    waits = [one for one in work.passes if one.leaves and not one.prunes]
    size = 0
    for leaf in frozenset[str]().union(*(one.leaves for one in waits)) & STATISTICS:
        by_row, by_column = LEAVES[leaf].shape
        for layer in (layer for layers in work.layers for layer in layers):
            rows, columns = layer.out_features, layer.in_features
            size += 4 * (rows if by_row else 1) * (columns if by_column else 1)
    return size


def _states(work: Work) -> int:
    """Return the hidden states that are put aside, of windows on their way or of all blocks."""
    windows, tokens = work.calibration
    kept = any(one.keeps_inputs for one in work.passes)
    aside = (len(work.blocks) if kept else 1) + 1 + 2 * bool(work.recipe.training)
    values = aside * windows * tokens + 2 * math.prod(work.evaluation)
    return work.item * int(work.model.config.get_text_config().hidden_size) * values


@dataclass(frozen=True)
class Plan:
    """How a pruning is carried out.

    Attributes:
        passes: Each pass and what it holds, by purpose.
        aside: What is held beside that, by purpose.
        budget: What may be held.
        on_disk: What is put aside on disk, by purpose.
        resident: Whether blocks stay in memory once they were opened.
        result: The pruned model's files.
    """

    passes: tuple[tuple[Pass, Rows], ...]
    aside: Rows
    budget: int
    on_disk: Rows
    resident: bool
    result: int

    @property
    def peak(self) -> int:
        """The bound of what is held."""
        return sum(self.aside.values()) + max(sum(rows.values()) for _, rows in self.passes)

    @property
    def disk(self) -> int:
        """Disk needed, for the result and what is put aside."""
        return self.result + sum(self.on_disk.values())

    def lines(self) -> list[str]:
        """Return the plan in words: how, the passes in order, and what is put aside."""
        how = "resident" if self.resident else "streamed, one block at a time"
        on_disk = sum(self.on_disk.values())
        aside = f"{size_text(on_disk)} on disk in the result's folder" if on_disk else "in memory"
        passes = [
            f"plan: {number}. {one}; holds {in_words(rows)}"
            for number, (one, rows) in enumerate(self.passes, 1)
        ]
        return [
            f"plan: {how}; at most {size_text(self.peak)} of {size_text(self.budget)} memory",
            *passes,
            f"plan: beside that {in_words(self.aside)}",
            f"plan: put aside {aside}; disk needed {size_text(self.disk)}",
        ]


def plan_pruning(
    work: Work, result: int, device: str, max_memory: str | None, whole: bool = False
) -> Plan:
    """Return how a pruning is carried out within a budget.

    Args:
        result: The dense model's files, and so the pruned one's.
        device: Of the passes.
        max_memory: What may be held, as `parse_size` reads it; None for what is free.
        whole: Whether the whole model is also loaded, before and after it is pruned.

    Raises:
        ValueError: If one block at a time is more than the budget; the message says what is
            needed.
    """
    budget = parse_size(max_memory) if max_memory else psutil.virtual_memory().available
    passes = tuple((one, held(one, work)) for one in work.passes)
    most = max((rows for _, rows in passes), key=lambda rows: sum(rows.values()))
    aside: Rows = {"libraries": LIBRARIES}
    least = LIBRARIES + sum(most.values())
    model = LIBRARIES + sum(work.blocks) + work.outside
    if (needed := max(least, model * whole)) > budget:
        what = f"the whole model {size_text(model)}" if needed > least else in_words(most)
        raise ValueError(
            f"max-memory must be at least {size_text(needed, up=True)} here ({what}), got "
            f"{size_text(budget)}: give more, or a smaller --seqlen or --dtype"
        )
    room, on_disk = budget - least, {}
    for name, size in {"hidden states": _states(work), "statistics": _statistics(work)}.items():
        if size <= room:
            aside[name], room = size, room - size
        else:
            on_disk[name] = size
    others = sum(work.blocks)
    if torch.device(device).type == "cuda":
        room = _room_on_device(max(work.blocks) + sum(most.values()), device)
    if others <= room:
        aside["other blocks"] = others
    return Plan(passes, aside, budget, on_disk, others <= room, result)


def _room_on_device(needed: int, device: str) -> int:
    """Return what a GPU has left beside an open block and the next one."""
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"device {device!r} must have {size_text(needed, up=True)} free, got "
            f"{size_text(free)}: use a smaller --seqlen, or --device cpu"
        )
    return free - needed


def in_words(rows: Rows) -> str:
    """Return sizes by purpose in one line, without those that are 0."""
    return ", ".join(f"{name} {size_text(size)}" for name, size in rows.items() if size)


def size_text(size: float, up: bool = False) -> str:
    """Return a size such as `12.55 GiB`, or in MiB where that says more; rounded up if asked."""
    unit, name = (GIB, "GiB") if size >= GIB / 10 else (1 << 20, "MiB")
    return f"{math.ceil(size / unit * 100) / 100 if up else size / unit:.2f} {name}"


def parse_size(text: str) -> int:
    """Return bytes of a size such as `6GiB`, `6G`, which is the same, `512MiB` or `6GB`.

    Raises:
        ValueError: If it is none.
    """
    units = {"GiB": GIB, "G": GIB, "MiB": 1 << 20, "M": 1 << 20, "GB": 10**9, "MB": 10**6}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|G|MiB|M|GB|MB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"max-memory must be a size such as 6GiB or 800MiB, got {text!r}")
    return int(float(match[1]) * units[match[2]])
