"""A bound of what a pruning holds in memory and puts on disk, from a model's shapes, in bytes.

The peak is the libraries, what is put aside, and in the largest pass a block, the sums of its
statistics and the largest work on it. What cannot fit is refused before any weight is read.
"""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
import torch
from pydantic import ByteSize
from torch import nn

from prunevolve.pruning.checkpoint import outside_blocks
from prunevolve.pruning.models import DTYPES, UnloadedModel, decoder_blocks, layers_by_block
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.passes import Pass, Procedure, passes_of
from prunevolve.pruning.statistics import DEVICE_CHUNK, GRAM, STATISTICS, TERMINALS, sums_size
from prunevolve.pruning.stream import HEAD_TOKENS

# What Python, torch and transformers hold before a model is opened.
LIBRARIES = int(0.6 * 2**30)

# Values in fp32 for each trained weight: it, its gradient, Adam's two, the best so far, and those
# that the passes make of it.
_TRAINED_VALUES = 8

# Values of the hidden size, and half as many of the intermediate size, kept for each token.
_SAVED_BY_GRAPH = 18

# Bytes for each score that a GPU sorts: it, sorted it and its place (16), where it was before (8),
# what a radix sort puts aside (12), a mask; rounded up.
_SORTED = 40

# Of control groups, v2 and v1: controller, limit, use, and what memory.stat calls the cache that is
# given back at once.
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Plan:
    """How a pruning is carried out."""

    passes: tuple[tuple[Pass, int], ...]  # what each holds beside libraries and what is put aside
    peak: int  # the bound of what is in the host's memory at any time
    budget: int  # what may be there
    resident: bool  # whether blocks stay in memory once they were opened
    aside: dict[str, int]  # hidden states and statistics, which are put aside
    on_disk: list[str]  # which of these go to disk
    disk: int  # what they and the result take there

    def lines(self) -> list[str]:
        """Return the plan in words: how, the passes in order, and what is put aside."""
        how = "resident" if self.resident else "streamed, one block at a time"
        places = {name: "on disk" if name in self.on_disk else "in memory" for name in self.aside}
        aside = [f"{text_of(size)} of {x} {places[x]}" for x, size in self.aside.items() if size]
        return [
            f"plan: {how}; at most {text_of(self.peak)} of {text_of(self.budget)} memory",
            *(
                f"plan: {i}. {x}; holds {text_of(size)}"
                for i, (x, size) in enumerate(self.passes, 1)
            ),
            f"plan: keeps {', '.join(aside)}; disk needed {text_of(self.disk)}",
        ]


def plan_pruning(
    model: UnloadedModel,
    procedure: Procedure,
    calibration: int,
    held_back: int,
    evaluation: int,
    max_memory: int | None,
    loads: bool = False,
) -> Plan:
    """Return how a pruning is carried out within a budget, or raise ValueError that it cannot be.

    Calibration, held back and evaluation are numbers of windows, `max_memory` is what may be held,
    in bytes, by default what is free, and `loads` says whether the whole model is also loaded,
    before and after it is pruned.
    """
    free = [psutil.virtual_memory().available, *cgroup_rooms(Path("/"))]
    budget = min(free) if max_memory is None else max_memory
    passes = passes_of(procedure, procedure.dense_terminals)
    peaks = tuple((each, peak_of(each, model, procedure)) for each in passes)
    loaded = loads * (sum(block_sizes(model)) + outside_size(model))
    most = max(loaded, *(size for _, size in peaks))
    on_gpu = torch.device(model.device).type == "cuda"
    # What a GPU holds is not in the host's memory, but a whole model is loaded by way of it.
    needed = LIBRARIES + ((loaded or _shard_size(model)) if on_gpu else most)
    if needed > budget:
        rest = "the whole model" if loads else "a block and the work on it"
        parts = f"{text_of(LIBRARIES)} for libraries, the rest for {rest}"
        least = f"{math.ceil(needed / 2**10)} KiB here, {text_of(needed)} ({parts})"
        way_out = "give more, or a smaller --seqlen or --dtype"
        raise ValueError(f"max-memory must be at least {least}, got {text_of(budget)}: {way_out}")
    room, on_disk = budget - needed, []
    aside = put_aside(model, passes, calibration, held_back, evaluation)
    for name, size in aside.items():
        if size <= room:
            room -= size
        else:
            on_disk.append(name)
    peak, blocks = budget - room, block_sizes(model)
    if on_gpu:
        there, _ = torch.cuda.mem_get_info(model.device)
        room = there - max(blocks) - most  # beside an open block and the next one
        if room < 0:
            rule = f"must have {text_of(there - room)} free, got {text_of(there)}"
            way_out = "use a smaller --seqlen, or --device cpu"
            raise ValueError(f"device {model.device!r} {rule}: {way_out}")
    resident = sum(blocks) <= room
    peak += sum(blocks) * (resident and not on_gpu)
    disk = model.file_size + sum(aside[name] for name in on_disk)
    return Plan(peaks, peak, budget, resident, aside, on_disk, disk)


def peak_of(each: Pass, model: UnloadedModel, procedure: Procedure) -> int:
    """Return what a pass holds at its peak, beside the libraries and what is put aside."""
    layers, item = _layers(model), DTYPES[model.dtype].itemsize
    largest = max(layer.weight.numel() for block in layers for layer in block)
    on_device = torch.device(model.device).type != "cpu"
    sorts = on_device and not procedure.target.group.whole_model
    nodes = {x for x in procedure.metric.nodes() if x.shape == MATRIX and x.name not in STATISTICS}
    scored = largest * max(4 * max(3, 1 + len(nodes)), _SORTED * sorts)
    if each.name == "threshold":
        return scored
    new = _shard_size(model) * (bool(each.prunes) or each.name == "measure")
    weights = max(sum(layer.weight.numel() for layer in block) for block in layers)
    # Beside a block without the update, of which one with half is made when its work is done.
    new += item * weights * ("masked" in each.enters)
    backward = each.name == "backward"
    window = item * activations(model, backward)
    window += 2 * item * largest * backward  # a weight's gradient, and it times a constant
    window += 16 * min(largest, DEVICE_CHUNK) * (backward and on_device)
    pruning = new + scored
    if GRAM in each.terminals:  # two copies of a weight; a Gram matrix, factor and inverses
        inputs = max(layer.in_features for block in layers for layer in block)
        pruning = max(pruning, new + 4 * (2 * largest + 4 * inputs**2))
    if procedure.training:
        trained = 4 * _TRAINED_VALUES * weights + item * activations(model, backward=True)
        pruning = max(pruning, new + trained)
    sums = max(sums_size(block, each.terminals) for block in layers) if each.terminals else 0
    work = max(window + new, pruning * bool(each.prunes))
    # A block is open, or the model's outside.
    return max(max(block_sizes(model)) + sums + work, outside_size(model) + head_size(model) + new)


def put_aside(
    model: UnloadedModel,
    passes: tuple[Pass, ...],
    calibration: int,
    held_back: int,
    evaluation: int,
) -> dict[str, int]:
    """Return the hidden states of all windows, and the statistics that wait for a later pass."""
    layers = _layers(model)
    kept = len(layers) if any(each.keeps_inputs for each in passes) else 1
    trains = any("targets" in each.enters for each in passes)
    windows = (kept + 1 + 2 * trains) * calibration + 6 * held_back + 2 * evaluation
    hidden_size: int = model.shapes.config.get_text_config().hidden_size
    waits = frozenset[str]().union(*(each.terminals for each in passes if not each.prunes))
    shapes = [layer.weight.shape for block in layers for layer in block]
    statistics = sum(4 * math.prod(TERMINALS[x].shape.sizes(*y)) for x in waits for y in shapes)
    states = DTYPES[model.dtype].itemsize * hidden_size * model.seqlen * windows
    return {"hidden states": states, "statistics": statistics}


def _layers(model: UnloadedModel) -> list[list[nn.Linear]]:
    return [list(layers.values()) for layers in layers_by_block(model.shapes).values()]


def block_sizes(model: UnloadedModel) -> list[int]:
    """Return the bytes of each block's parameters."""
    item, blocks = DTYPES[model.dtype].itemsize, decoder_blocks(model.shapes).values()
    return [item * sum(p.numel() for p in block.parameters()) for block in blocks]


def outside_size(model: UnloadedModel) -> int:
    """Return the bytes of the parameters outside the blocks."""
    outside = set(outside_blocks(model.shapes).values())  # tied ones once
    return DTYPES[model.dtype].itemsize * sum(p.numel() for p in outside)


def head_size(model: UnloadedModel) -> int:
    """Return the bytes of the logits of some tokens, in fp32, with what is made of them."""
    vocabulary: int = model.shapes.config.get_text_config().vocab_size
    return 3 * 4 * HEAD_TOKENS * vocabulary


def _shard_size(model: UnloadedModel) -> int:
    """Return the most that a block's new weights take, until its shard is written."""
    weights = max(sum(layer.weight.numel() for layer in block) for block in _layers(model))
    return DTYPES[model.own_dtype].itemsize * weights


def activations(model: UnloadedModel, backward: bool) -> int:
    """Return a bound of the values of one window's activations in one block."""
    config, length = model.shapes.config.get_text_config(), model.seqlen
    wide: int = getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0)
    scores = 2 * (length if backward else min(length, 64))
    if config._attn_implementation == "eager":  # all queries at once, and a softmax in fp32
        scores = (9 if backward else 5) * length
    values = _SAVED_BY_GRAPH * int(config.hidden_size) + _SAVED_BY_GRAPH // 2 * wide
    return length * (values + scores * int(config.num_attention_heads))


def cgroup_rooms(root: Path) -> list[int]:
    """Return what each control group of this process, and those above it, leave of their limits."""
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


def text_of(size: int) -> str:
    """Return a size in words."""
    return ByteSize(size).human_readable(separator=" ")
