"""A bound of what a pruning holds in memory and puts on disk, from a model's shapes.

Sizes are bytes. At the peak of each pass there are the libraries, what is put aside, and `held`: a
block, the sums of its statistics and the largest work on it. Nothing here reads a weight, and what
cannot fit is refused before any work.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from prunevolve.pruning.models import DTYPES, decoder_blocks, layers_by_block, outside_blocks
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.passes import Pass, Recipe, passes_of
from prunevolve.pruning.statistics import (
    DEVICE_CHUNK,
    GRAM,
    STATISTICS,
    TERMINALS,
    sums_size,
)
from prunevolve.pruning.stream import HEAD_TOKENS

LIBRARIES = int(0.6 * 2**30)
"""What Python, torch and transformers hold before a model is opened."""

_TRAINED_VALUES = 8
"""Values in fp32 for each trained weight: it, its gradient, Adam's two, the best so far, and those
that the passes make of it."""

_SAVED_BY_GRAPH = 18
"""Values of the hidden size, and half as many of the intermediate size, kept for each token."""

_SORTED = 40
"""Bytes for each score that a GPU sorts: it, sorted it and its place (16), where it was before (8),
what a radix sort puts aside (12), a mask; rounded up."""

_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups, v2 and v1: controller, limit, use, and what memory.stat calls the cache that
is given back at once."""

Rows = dict[str, int]
"""Bytes by purpose."""


@dataclass(frozen=True)
class Work:
    """What passes a model, and what is computed of it.

    Attributes:
        model: Shapes; its parameters are not looked at.
        dtype: Of the passes, a key of `DTYPES`.
        device: Of the passes.
        saved_dtype: Of the pruned weights.
        calibration: Number of windows for statistics, and tokens in each.
        evaluation: Number of windows for perplexity, and tokens in each.
    """

    model: PreTrainedModel
    recipe: Recipe
    dtype: str
    device: str
    saved_dtype: str
    calibration: tuple[int, int]
    evaluation: tuple[int, int]

    @property
    def item(self) -> int:
        """Bytes of a value in the passes."""
        return DTYPES[self.dtype].itemsize

    @cached_property
    def layers(self) -> list[list[nn.Linear]]:
        """The prunable layers of each block."""
        return [list(layers.values()) for layers in layers_by_block(self.model).values()]

    @cached_property
    def blocks(self) -> list[int]:
        """The size of each block."""
        blocks = decoder_blocks(self.model).values()
        return [self.item * sum(p.numel() for p in block.parameters()) for block in blocks]

    @property
    def outside(self) -> int:
        """The size of embeddings, norms and head, tied ones once."""
        return self.item * sum(p.numel() for p in set(outside_blocks(self.model).values()))

    @property
    def shard(self) -> int:
        """The most that a block's new weights take, until its shard is written."""
        prunable = max(sum(layer.weight.numel() for layer in layers) for layers in self.layers)
        return DTYPES[self.saved_dtype].itemsize * prunable

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, where no statistics are kept from before."""
        return passes_of(self.recipe, self.recipe.dense_terminals)


def held(one: Pass, work: Work) -> Rows:
    """Return what a pass holds at its peak, beside the libraries and what is put aside."""
    sizes = [[layer.weight.numel() for layer in layers] for layers in work.layers]
    largest, prunable = max(map(max, sizes)), max(map(sum, sizes))
    on_device = torch.device(work.device).type != "cpu"
    sorts = on_device and not work.recipe.target.group.whole_model
    scored = largest * max(4 * _values(work.recipe), _SORTED * sorts)
    if one.name == "threshold":
        return {"scores": scored}
    new = work.shard * (bool(one.prunes) or one.name == "measure")
    backward = one.name == "backward"
    lengths = [work.evaluation[1], work.calibration[1] * bool(one.terminals)]
    window = work.item * max(_activations(work.model, length, backward) for length in lengths)
    window += 2 * work.item * largest * backward  # a weight's gradient, and it times a constant
    window += 16 * min(largest, DEVICE_CHUNK) * (backward and on_device)
    pruning = new + scored
    if GRAM in one.terminals:  # two copies of a weight; a Gram matrix, factor and inverses
        inputs = max(layer.in_features for layers in work.layers for layer in layers)
        pruning = max(pruning, new + 4 * (2 * largest + 4 * inputs**2))
    if work.recipe.training:
        trained = work.item * _activations(work.model, work.calibration[1], True)
        pruning = max(pruning, new + 4 * _TRAINED_VALUES * prunable + trained)
    sums = max(sums_size(layers, one.terminals) for layers in work.layers) if one.terminals else 0
    works = max(window + new, pruning * bool(one.prunes))
    block = {"a block": max(work.blocks), "sums": sums, "work": works}
    logits = 3 * 4 * HEAD_TOKENS * work.model.config.get_text_config().vocab_size
    ends = {"embeddings and head": work.outside, "logits": logits, "a shard": new}
    return max(block, ends, key=lambda rows: sum(rows.values()))


def _values(recipe: Recipe) -> int:
    """Return the fp32 values for each weight of a matrix that is scored and masked."""
    nodes = set(recipe.metric.nodes())
    return max(3, 1 + sum(x.shape == MATRIX and x.name not in STATISTICS for x in nodes))


def _activations(model: PreTrainedModel, length: int, backward: bool) -> int:
    """Return the number of values of one window's activations in one block, from above."""
    config = model.config.get_text_config()
    wide: int = getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0)
    scores = 2 * (length if backward else min(length, 64))
    if config._attn_implementation == "eager":  # all queries at once, and a softmax in fp32
        scores = (9 if backward else 5) * length
    values = _SAVED_BY_GRAPH * int(config.hidden_size) + _SAVED_BY_GRAPH // 2 * wide
    return length * (values + scores * int(config.num_attention_heads))


def put_aside(work: Work) -> Rows:
    """Return the hidden states of all windows, and the statistics that wait for a later pass."""
    windows, tokens = work.calibration
    kept = len(work.blocks) if any(one.keeps_inputs for one in work.passes) else 1
    values = (kept + 1 + 2 * bool(work.recipe.training)) * windows * tokens
    values += 2 * math.prod(work.evaluation)
    states = work.item * int(work.model.config.get_text_config().hidden_size) * values
    waits = frozenset[str]().union(*(one.terminals for one in work.passes if not one.prunes))
    statistics = sum(
        4 * (layer.out_features if by_row else 1) * (layer.in_features if by_column else 1)
        for by_row, by_column in (TERMINALS[terminal].shape for terminal in waits)
        for layers in work.layers
        for layer in layers
    )
    return {"hidden states": states, "statistics": statistics}


@dataclass(frozen=True)
class Plan:
    """How a pruning is carried out.

    Attributes:
        passes: Each pass and what it holds, by purpose; on a GPU, of its memory.
        beside: What is in the host's memory beside that, by purpose.
        peak: The bound of what is held there.
        budget: What may be held.
        on_disk: What is put aside on disk, by purpose.
        resident: Whether blocks stay in memory once they were opened.
        result: The pruned model's files.
    """

    passes: tuple[tuple[Pass, Rows], ...]
    beside: Rows
    peak: int
    budget: int
    on_disk: Rows
    resident: bool
    result: int

    @property
    def disk(self) -> int:
        """Disk needed, for the result and what is put aside."""
        return self.result + sum(self.on_disk.values())

    def lines(self) -> list[str]:
        """Return the plan in words: how, the passes in order, and what is put aside."""
        how = "resident" if self.resident else "streamed, one block at a time"
        aside = f"on disk, {in_words(self.on_disk)}" if self.on_disk else "in memory"
        passes = [
            f"plan: {number}. {one}; holds {in_words(rows)}; reads the weights "
            f"{'twice' if one.name == 'threshold' else 'once'}"
            for number, (one, rows) in enumerate(self.passes, 1)
        ]
        return [
            f"plan: {how}; at most {_text(self.peak)} of {_text(self.budget)} memory",
            f"plan: in all passes {in_words(self.beside)}",
            *passes,
            f"plan: put aside {aside}; disk needed {_text(self.disk)}",
        ]


def plan_pruning(work: Work, result: int, max_memory: str | None, whole: bool = False) -> Plan:
    """Return how a pruning is carried out within a budget.

    Args:
        result: The dense model's files, and so the pruned one's.
        max_memory: What may be held, such as `6GiB` or `800MB`; None for what is free.
        whole: Whether the whole model is also loaded, before and after it is pruned.

    Raises:
        ValueError: If one block at a time is more than the budget, or a GPU has; the message says
            what is needed.
    """
    free = [psutil.virtual_memory().available, *cgroup_rooms(Path("/"))]
    budget = _size(max_memory) if max_memory else min(free)
    passes = tuple((one, held(one, work)) for one in work.passes)
    most = max((rows for _, rows in passes), key=lambda rows: sum(rows.values()))
    loaded = {"the whole model": sum(work.blocks) + work.outside} if whole else {}
    larger = loaded if sum(loaded.values()) > sum(most.values()) else most
    on_gpu = torch.device(work.device).type == "cuda"
    on_host = (loaded or {"a shard": work.shard}) if on_gpu else larger  # loaded by way of it
    needs = {"libraries": LIBRARIES, **on_host}
    if (needed := sum(needs.values())) > budget:
        raise ValueError(
            f"max-memory must be at least {math.ceil(needed / 2**10)} KiB here, {_text(needed)} "
            f"({in_words(needs)}), got {_text(budget)}: give more, or a smaller --seqlen or --dtype"
        )
    beside: Rows = {"libraries": LIBRARIES}
    on_disk: Rows = {}
    room = budget - needed
    for name, size in put_aside(work).items():
        if size <= room:
            beside[name], room = size, room - size
        else:
            on_disk[name] = size
    if on_gpu:
        room = _room_on_device(max(work.blocks) + sum(larger.values()), work.device)
    resident = sum(work.blocks) <= room
    if resident and not on_gpu:
        beside["other blocks"] = sum(work.blocks)
    peak = sum(beside.values()) + needed - LIBRARIES
    return Plan(passes, beside, peak, budget, on_disk, resident, result)


def cgroup_rooms(root: Path) -> list[int]:
    """Return what each control group of this process leaves of its limit, in bytes.

    So do those above one; a container may have no more than these.
    """
    rooms, listed = [], root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    for line, (name, limit, used, cached) in product(lines, _CGROUPS):
        _, controllers, path = line.split(":", 2)
        group = root / "sys/fs/cgroup" / name / path.strip("/")
        for folder in (group, *group.parents) if name in controllers.split(",") else ():
            most = (folder / limit).read_text().strip() if (folder / limit).is_file() else "max"
            if most != "max":
                rows = (folder / "memory.stat").read_text().splitlines()
                at_once = int(dict(row.split() for row in rows).get(cached, 0))
                rooms.append(max(0, int(most) - int((folder / used).read_text()) + at_once))
    return rooms


def _room_on_device(needed: int, device: str) -> int:
    """Return what a GPU has left beside an open block and the next one."""
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ValueError(
            f"device {device!r} must have {_text(needed)} free, got {_text(free)}: use a smaller "
            "--seqlen, or --device cpu"
        )
    return free - needed


def in_words(rows: Rows) -> str:
    """Return sizes by purpose in one line, without those that are 0."""
    return ", ".join(f"{name} {_text(size)}" for name, size in rows.items() if size)


def _text(size: int) -> str:
    return ByteSize(size).human_readable(separator=" ")


def _size(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise ValueError(
            f"max-memory must be a size such as 6GiB or 800MB, got {text!r}"
        ) from error
