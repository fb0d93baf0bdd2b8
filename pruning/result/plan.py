"""What a pruning request will cost, said before any work: memory, disk, passes over the weights.

Sizes are bytes. Activations are estimates from above, all else follows from the model's shapes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pruning.ends import HEAD_TOKENS
from pruning.leaves import LEAVES, need_backward, sums_size
from pruning.models import (
    DTYPES,
    decoder_blocks,
    layers_of_block,
    linear_layers,
    outside_blocks,
)
from pruning.operators import MATRIX
from pruning.recipe import Recipe
from pruning.result.request import Subject

GIB = 1 << 30

LIBRARIES = 0.6 * GIB
"""What Python, torch and transformers hold before a model is opened."""

SCORING = 6 * 4
"""Bytes for each weight of a matrix while it is scored and selected: six fp32 values."""

_SAVED_BY_GRAPH = 18
"""Values of the hidden size, and half as many of the intermediate size, kept for each token."""


@dataclass(frozen=True)
class Load:
    """The windows that a request lets pass the blocks.

    Attributes:
        calibration: Windows for statistics, 0 if none are needed.
        evaluation: Windows that perplexity is measured on.
        length: Tokens in each.
    """

    calibration: int
    evaluation: int
    length: int


@dataclass(frozen=True)
class Plan:
    """How a request is carried out.

    Attributes:
        memory: Bytes held at the peak, by what.
        budget: Bytes that may be held.
        held: Blocks that stay in memory once they were opened: all of them, or none.
        states_on_disk: Whether hidden states are put aside on disk.
        statistics_on_disk: Bytes of statistics that are put aside on disk.
        states: Bytes of hidden states that are put aside.
        result: Bytes of the pruned model.
        passes: How often all blocks are read.
        model: Bytes of the dense model's files.
    """

    memory: dict[str, int]
    budget: int
    held: int
    states_on_disk: bool
    statistics_on_disk: int
    states: int
    result: int
    passes: int
    model: int

    @property
    def peak(self) -> int:
        """Bytes held at the peak."""
        return sum(self.memory.values())

    @property
    def disk(self) -> int:
        """Bytes of disk needed, the result among them."""
        return self.result + self.statistics_on_disk + self.states * self.states_on_disk

    @property
    def read(self) -> int:
        """Bytes read: the weights in each pass, and what was put aside on disk."""
        weights = self.model * (1 if self.held else self.passes)
        # A threshold over the model goes through all scores three times.
        return weights + 3 * self.statistics_on_disk + 2 * self.states * self.states_on_disk

    def lines(self) -> list[str]:
        """Return the plan in words, the first line for itself."""
        how = "resident" if self.held else "streamed, one block at a time"
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in self.memory.items() if size)
        aside = "in memory"
        if self.states_on_disk or self.statistics_on_disk:
            on_disk = self.statistics_on_disk + self.states * self.states_on_disk
            aside = f"{size_text(on_disk)} on disk in the result's folder"
        return [
            f"plan: {how}; at most {size_text(self.peak)} of {size_text(self.budget)} memory",
            f"plan: memory for {parts}",
            f"plan: put aside {aside}; disk needed {size_text(self.disk)}",
            f"plan: {self.passes} passes over the weights; reads {size_text(self.read)}, writes "
            f"{size_text(self.disk)}",
        ]


def make_plan(
    model: PreTrainedModel,
    recipe: Recipe,
    load: Load,
    subject: Subject,
    model_size: int,
    budget: int | None,
) -> Plan:
    """Return how a request is carried out within a budget.

    Args:
        model: The model, of which the shapes alone are looked at.
        subject: Its dtype and device of the passes are looked at.
        model_size: Bytes of the dense model's files.
        budget: Bytes; None for what is free.

    Raises:
        ValueError: If one block at a time is more than the budget; the message says what is
            needed.
    """
    item = DTYPES[subject.dtype].itemsize
    blocks = [_elements(block) * item for block in decoder_blocks(model).values()]
    backward = bool(need_backward(recipe.leaves))
    memory = _at_one_time(model, recipe, load, item)
    available = psutil.virtual_memory().available if budget is None else budget
    room = available - sum(memory.values())
    if room < 0:
        raise ValueError(
            f"max-memory must be at least {size_text(available - room, up=True)} here (a block "
            f"{size_text(memory['a block'])}, sums {size_text(memory['sums'])}, work "
            f"{size_text(memory['work'])}), got {size_text(available)}: give more, or a smaller "
            "--seqlen or --dtype"
        )
    states = states_size(model.config.get_text_config(), load, len(blocks) * backward or 1, item)
    states_fit = states <= room
    room -= states * states_fit
    waiting = _statistics(model, recipe) if recipe.decides == "last" else 0
    waiting_fits = waiting <= room
    room -= waiting * waiting_fits
    if torch.device(subject.device).type == "cuda":
        room = _room_on_device(memory, subject.device)
    held = sum(blocks) <= room
    on_host = {"hidden states": states * states_fit, "statistics": waiting * waiting_fits}
    return Plan(
        memory | on_host | {"other blocks": sum(blocks) * held},
        available,
        len(blocks) * held,
        not states_fit,
        0 if waiting_fits else waiting,
        states,
        model_size,
        1 + (2 if backward else int(recipe.decides == "last" and bool(load.evaluation))),
        model_size,
    )


def _at_one_time(model: PreTrainedModel, recipe: Recipe, load: Load, item: int) -> dict[str, int]:
    """Return the bytes that are held while one block is open, by what."""
    sizes = [layer.weight.numel() for layer in linear_layers(model).values()]
    config = model.config.get_text_config()
    backward = bool(need_backward(recipe.leaves))
    block = max(_elements(block) for block in decoder_blocks(model).values()) * item
    sums = _sums(model, recipe) if recipe.decides != "last" or backward else 0
    window = bool(load.calibration or load.evaluation) * window_activations(
        config, load.length, backward, item
    )
    # A matrix is scored and selected in fp32; the block's new weights wait beside it.
    scoring = SCORING * max(sizes) + 2 * sum(sizes) // len(decoder_blocks(model))
    work = max(window + 2 * max(sizes) * item * backward, scoring)
    outside = sum(p.numel() for p in set(outside_blocks(model).values())) * item
    work = max(work, outside + logits_size(config) - block - sums)
    return {"libraries": int(LIBRARIES), "a block": block, "sums": sums, "work": work}


def _sums(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the bytes of one block's sums that are as large as its weights, fp32."""
    blocks = decoder_blocks(model).items()
    return max(sums_size(layers_of_block(*block).values(), recipe.leaves) for block in blocks)


def _statistics(model: PreTrainedModel, recipe: Recipe) -> int:
    """Return the bytes of all blocks' statistics that are as large as their weights, fp32."""
    matrices = frozenset(name for name in recipe.leaves if LEAVES[name].shape == MATRIX)
    return sums_size(linear_layers(model).values(), matrices)


def _room_on_device(memory: Mapping[str, int], device: str) -> int:
    """Return the bytes that a GPU has left beside an open block and the next one.

    Raises:
        ValueError: If these are more than it has.
    """
    free, _ = torch.cuda.mem_get_info(device)
    needed = 2 * memory["a block"] + memory["sums"] + memory["work"]
    if needed > free:
        raise ValueError(
            f"device {device!r} must have {size_text(needed, up=True)} free, got "
            f"{size_text(free)}: use a smaller --seqlen, or --device cpu"
        )
    return free - needed


def window_activations(config: PretrainedConfig, length: int, backward: bool, item: int) -> int:
    """Return bytes of one window's activations in one block, from above.

    Args:
        config: Of the text model.
        length: Tokens of the window.
        backward: Whether they are kept for a backward pass.
        item: Bytes of a value.
    """
    wide: int = getattr(config, "intermediate_size", 0) or getattr(config, "ffn_dim", 0)
    hidden, heads = config.hidden_size, config.num_attention_heads
    values = length * (_SAVED_BY_GRAPH * hidden + _SAVED_BY_GRAPH // 2 * wide)
    scores = length * min(length, 64 if not backward else length) * heads
    return int((values + 2 * scores) * item)


def logits_size(config: PretrainedConfig) -> int:
    """Return bytes of the fp32 logits that exist at one time, and what is made of them."""
    return int(3 * 4 * HEAD_TOKENS * config.vocab_size)


def states_size(config: PretrainedConfig, load: Load, kept: int, item: int) -> int:
    """Return bytes of hidden states that are put aside at the peak.

    Args:
        config: Of the text model.
        kept: Blocks whose inputs stay, of the calibration windows.
        item: Bytes of a value.
    """
    window: int = load.length * config.hidden_size * item
    return window * (load.calibration * (kept + 1) + 2 * load.evaluation)


def size_text(size: float, up: bool = False) -> str:
    """Return a size such as `12.55 GiB`, or in MiB where that says more; rounded up if asked."""
    unit, name = (GIB, "GiB") if size >= GIB / 10 else (1 << 20, "MiB")
    return f"{math.ceil(size / unit * 100) / 100 if up else size / unit:.2f} {name}"


def parse_size(text: str) -> int:
    """Return bytes of a size such as `6GiB`, `512MiB` or `6GB`.

    Raises:
        ValueError: If it is none.
    """
    units = {"GiB": GIB, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"max-memory must be a size such as 6GiB or 800MiB, got {text!r}")
    return int(float(match[1]) * units[match[2]])


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
