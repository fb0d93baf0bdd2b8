"""What a pruning needs in memory and on disk, from a model's shapes.

Sizes are bytes. Activations and libraries are estimates from above; all else follows from the
shapes. Nothing here reads a weight.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from prunevolve.pruning.embed_and_head import HEAD_TOKENS
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.models import DTYPES, decoder_blocks, layers_of_block, outside_blocks
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.statistics import (
    COLLECTED,
    GRAM,
    LEAVES,
    STATISTICS,
    need_backward,
    sums_size,
)

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
class Sizes:
    """What one model's passes, statistics and scores take.

    Attributes:
        blocks: The parameters of each block, in the dtype of the passes.
        outside: Those outside the blocks.
        statistics: All statistics of the leaves.
        sums: The running sums of the block with the largest.
        window: What passes a block at a time, with its gradients if a leaf needs them.
        scoring: One matrix while it is scored, masked and updated, beside its block's new weights,
            or a block that is trained.
        new_weights: Those of the largest block, as they are saved.
        logits: Those that exist at one time.
        states: The hidden states that are put aside.
    """

    blocks: tuple[int, ...]
    outside: int
    statistics: int
    sums: int
    window: int
    scoring: int
    new_weights: int
    logits: int
    states: int

    @property
    def model(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.blocks) + self.outside


@dataclass(frozen=True)
class Work:
    """What passes a model, and what is computed of it.

    Attributes:
        dtype: Of the passes, a key of `DTYPES`.
        saved_dtype: Of the pruned weights.
        leaves: All that calibration computes at one time or another.
        calibration: Number of windows for statistics, and tokens in each.
        evaluation: Number of windows for perplexity, and tokens that pass at a time.
        values: In fp32, for each weight of a matrix while it is scored and masked.
        trains: Whether each block is trained once it is pruned.
    """

    dtype: str
    saved_dtype: str
    leaves: frozenset[str]
    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    values: int
    trains: bool = False


def sizes_of(model: PreTrainedModel, work: Work) -> Sizes:
    """Return what work on a model takes; only the model's shapes are used."""
    item, saved_item = DTYPES[work.dtype].itemsize, DTYPES[work.saved_dtype].itemsize
    leaves = work.leaves & COLLECTED.keys()
    of_gradients = need_backward(leaves)
    backward = bool(of_gradients)
    config = model.config.get_text_config()
    blocks = decoder_blocks(model)
    layers_by_block = [list(layers_of_block(*block).values()) for block in blocks.items()]
    layers = [layer for of_block in layers_by_block for layer in of_block]
    largest = max(layer.weight.numel() for layer in layers)
    most_in_block = max(sum(x.weight.numel() for x in of_block) for of_block in layers_by_block)
    (windows, tokens), (_, evaluated_tokens) = work.calibration, work.evaluation
    evaluated = _activations(config, evaluated_tokens, False)
    calibrated = _activations(config, tokens, backward) + 2 * largest * backward
    kept_inputs = (len(blocks) if backward else 1) + 1
    put_aside = (kept_inputs + 2 * work.trains) * windows * tokens + 2 * math.prod(work.evaluation)
    scoring = max(4 * work.values * largest, _update(layers) if GRAM in leaves else 0)
    if work.trains:
        trained = item * _activations(config, tokens, True)
        scoring = max(scoring, 4 * _TRAINED_VALUES * most_in_block + trained)
    # Sums of inputs are complete before those of gradients begin.
    parts = (leaves - of_gradients, of_gradients)
    return Sizes(
        blocks=tuple(item * sum(p.numel() for p in x.parameters()) for x in blocks.values()),
        outside=item * sum(p.numel() for p in set(outside_blocks(model).values())),
        statistics=_statistics(layers, leaves & STATISTICS),
        sums=max(sums_size(of_block, part) for of_block in layers_by_block for part in parts),
        window=item * max(evaluated, calibrated if windows else 0),
        scoring=scoring + saved_item * most_in_block,
        new_weights=saved_item * most_in_block,
        logits=3 * 4 * HEAD_TOKENS * config.vocab_size,  # fp32, and what is made of them
        states=item * config.hidden_size * put_aside,
    )


def _update(layers: Sequence[nn.Linear]) -> int:
    """Return what an update takes: two copies of a weight; a Gram matrix, factor and inverses."""
    largest = max(layer.weight.numel() for layer in layers)
    most_inputs = max(layer.in_features for layer in layers)
    return 4 * (2 * largest + 4 * most_inputs**2)


def _statistics(layers: Sequence[nn.Linear], leaves: frozenset[str]) -> int:
    """Return the size of all layers' statistics, which are fp32."""
    size = 0
    for leaf in leaves:
        by_row, by_column = LEAVES[leaf].shape
        for layer in layers:
            rows, columns = layer.out_features, layer.in_features
            size += 4 * (rows if by_row else 1) * (columns if by_column else 1)
    return size


def values_of(metric: Metric) -> int:
    """Return the fp32 values for each weight of a matrix that is scored and masked by a metric."""
    nodes = set(metric.nodes())
    parts = [x for x in nodes if x.shape == MATRIX and x.name not in STATISTICS]
    return max(3, 1 + len(parts))


def _activations(config: PretrainedConfig, length: int, backward: bool) -> int:
    """Return the number of values of one window's activations in one block, from above."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    wide: int = getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0)
    values = length * (_SAVED_BY_GRAPH * hidden + _SAVED_BY_GRAPH // 2 * wide)
    attended = length if backward else min(length, 64)
    return values + 2 * length * attended * heads


@dataclass(frozen=True)
class Plan:
    """How a pruning is carried out.

    Attributes:
        memory: What is held at the peak, by purpose.
        budget: What may be held.
        on_disk: What is put aside on disk, by purpose.
        resident: Whether blocks stay in memory once they were opened.
        result: The pruned model's files.
        passes: How often all blocks are read.
    """

    memory: Rows
    budget: int
    on_disk: Rows
    resident: bool
    result: int
    passes: int

    @property
    def disk(self) -> int:
        """Disk needed, for the result and what is put aside."""
        return self.result + sum(self.on_disk.values())

    def lines(self) -> list[str]:
        """Return the plan in words, the first line for itself."""
        how = "resident" if self.resident else "streamed, one block at a time"
        peak, on_disk = sum(self.memory.values()), sum(self.on_disk.values())
        aside = f"{size_text(on_disk)} on disk in the result's folder" if on_disk else "in memory"
        return [
            f"plan: {how}; at most {size_text(peak)} of {size_text(self.budget)} memory",
            f"plan: memory for {in_words(self.memory)}",
            f"plan: put aside {aside}; disk needed {size_text(self.disk)}",
            f"plan: the weights are read {self.passes} {'time' if self.passes == 1 else 'times'}",
        ]


def plan_pruning(
    sizes: Sizes, recipe: Recipe, result: int, device: str, budget: int | None
) -> Plan:
    """Return how a pruning is carried out within a budget.

    Args:
        result: The dense model's files, and so the pruned one's.
        device: Of the passes.
        budget: Memory that may be held; None for what is free.

    Raises:
        ValueError: If one block at a time is more than the budget; the message says what is
            needed.
    """
    block = max(sizes.blocks)
    collects = recipe.needs_gradients or bool(recipe.pruned_leaves) or not recipe.statistics_wait
    sums = sizes.sums * collects
    # A block's shard is written while windows pass the next one.
    work = max(sizes.window + sizes.new_weights, sizes.scoring)
    work = max(work, sizes.outside + sizes.logits + sizes.new_weights - block - sums)
    memory = {"libraries": LIBRARIES, "a block": block, "sums": sums, "work": work}
    available = psutil.virtual_memory().available if budget is None else budget
    room = available - sum(memory.values())
    if room < 0:
        raise ValueError(
            f"max-memory must be at least {size_text(available - room, up=True)} here (a block "
            f"{size_text(block)}, sums {size_text(sums)}, work {size_text(work)}), got "
            f"{size_text(available)}: give more, or a smaller --seqlen or --dtype"
        )
    on_disk: Rows = {}
    statistics = sizes.statistics if recipe.statistics_wait else 0
    for name, size in {"hidden states": sizes.states, "statistics": statistics}.items():
        if size <= room:
            memory[name], room = size, room - size
        else:
            on_disk[name] = size
    if torch.device(device).type == "cuda":
        room = _room_on_device(2 * block + sums + work, device)
    resident = sum(sizes.blocks) <= room
    return Plan(
        memory=memory | {"other blocks": sum(sizes.blocks) * resident},
        budget=available,
        on_disk=on_disk,
        resident=resident,
        result=result,
        passes=3 if recipe.needs_gradients else 1 + recipe.statistics_wait,
    )


def with_whole_model(plan: Plan, sizes: Sizes) -> Plan:
    """Return a plan in which the whole model is also loaded, before and after it is pruned.

    Raises:
        ValueError: If the model is more than the budget.
    """
    memory = {"libraries": LIBRARIES, "the whole model": sizes.model}
    if (needed := sum(memory.values())) > plan.budget:
        raise ValueError(
            f"max-memory must be at least {size_text(needed, up=True)} for zero-shot tasks, which "
            f"take the whole model; got {size_text(plan.budget)}: give more, or leave them out"
        )
    return replace(plan, memory=max(plan.memory, memory, key=lambda rows: sum(rows.values())))


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
