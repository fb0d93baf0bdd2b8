"""The memory that a search's workers need, computed in advance: on a device, and on a node's host.

Sizes are in bytes and follow from the models' shapes; those of activations, libraries and CUDA are
upper estimates. Nothing here queries the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from pruning.leaves import LEAVES, STATISTICS, need_backward, sums_size
from pruning.models import DTYPES, decoder_blocks, layers_of_block
from pruning.operators import MATRIX
from pruning.result.plan import (
    GIB,
    LIBRARIES,
    SCORING,
    Load,
    logits_size,
    size_text,
    states_size,
    window_activations,
)
from search.resident import Memory

CUDA = 1 * GIB
"""Device memory taken by CUDA's context and its libraries' workspaces."""

Rows = dict[str, int]
"""Bytes by purpose."""


@dataclass(frozen=True)
class Held:
    """A model that every worker holds, and the texts that it reads.

    Attributes:
        model: A skeleton; only its shapes are used.
        dtype: Dtype of its passes, a key of `DTYPES`.
        calibration: Windows for the statistics.
        calibration_length: Tokens in each of them.
        longest: Tokens of the longest window that is measured.
        kept_tokens: Tokens whose final hidden states are kept for the objective `kl`, else 0.
    """

    model: PreTrainedModel
    dtype: str
    calibration: int
    calibration_length: int
    longest: int
    kept_tokens: int

    @property
    def item(self) -> int:
        """Bytes of a weight in the passes."""
        return DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> int:
        """Number of parameters, counting tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def prunable(self) -> int:
        """Number of weights that get pruned."""
        return sum(sum(sizes) for sizes in self._blocks())

    @property
    def block(self) -> int:
        """Number of prunable weights in the largest block."""
        return max(sum(sizes) for sizes in self._blocks())

    @property
    def matrix(self) -> int:
        """Number of weights in the largest prunable matrix."""
        return max(max(sizes) for sizes in self._blocks())

    def _blocks(self) -> list[list[int]]:
        return [
            [layer.weight.numel() for layer in layers_of_block(name, block).values()]
            for name, block in decoder_blocks(self.model).items()
        ]


@dataclass(frozen=True)
class Needs:
    """Bytes by purpose.

    Attributes:
        device: Per worker, on its GPU; empty if workers run on the CPU.
        worker: Per worker, on the host.
        node: Once per host, however many workers there are.
    """

    device: Rows
    worker: Rows
    node: Rows

    def host(self, workers: int) -> int:
        """Return the host memory, in bytes, that a node with this many workers needs."""
        return sum(self.node.values()) + workers * sum(self.worker.values())


def needs_of(
    models: Sequence[Held],
    leaves: frozenset[str],
    memory: Memory,
    keeps_scores: bool,
    on_gpu: bool,
    by_ray: bool,
) -> Needs:
    """Return the memory that the workers of a search need.

    Args:
        models: The models.
        leaves: The leaves that metrics may use.
        memory: What is kept in memory besides the models, and where.
        keeps_scores: Whether all scores of a formula are needed more than once: for one threshold
            over the whole model, or for several tasks of one model.
        on_gpu: Whether workers run on GPUs.
        by_ray: Whether workers are separate processes, which get the statistics from Ray.
    """
    leaves &= STATISTICS
    phases = [evaluating(models, leaves, memory, keeps_scores), collecting(models, leaves, memory)]
    if not on_gpu:
        # Without a GPU, the host is the device.
        phases = [phase | {"master copy": master_size(models)} for phase in phases]
    statistics = sum(statistics_size(held.model, leaves, memory.statistics) for held in models)
    node = {
        "statistics in Ray's object store": statistics * by_ray,
        "the driver": int(LIBRARIES) * by_ray + statistics * (2 if by_ray else 1),
        "collecting": statistics + max(_states(held, leaves) for held in models),
    }
    if on_gpu:
        device = max(phases, key=lambda rows: sum(rows.values())) | {"CUDA": CUDA}
        worker = {
            "libraries": int(LIBRARIES),
            # The process keeps this memory after loading: see `pruning.memory`.
            "model while it is loaded": sum(held.parameters * held.item for held in models),
            "master copy": master_size(models) * (memory.master == "host"),
        }
        return Needs(device, worker, node)
    # Workers read the statistics from the object store, or use those that they collected.
    worker = {"libraries": int(LIBRARIES), **phases[0], "statistics": 0}
    excess = sum(phases[1].values()) - sum(worker.values()) + worker["libraries"]
    node["collecting"] += max(0, excess)
    return Needs({}, worker, node)


def evaluating(
    models: Sequence[Held], leaves: frozenset[str], memory: Memory, keeps_scores: bool
) -> Rows:
    """Return a worker's device memory while candidates are scored and measured."""
    kept = 0
    if keeps_scores and memory.scores == "keep":
        # One formula's of each model; the report compares the masks of two, model by model.
        sizes = [4 * held.prunable for held in models]
        kept = sum(sizes) + max(sizes)
    return {
        **_resident(models, memory),
        "statistics": sum(
            statistics_size(held.model, leaves, memory.statistics) for held in models
        ),
        "scores": kept + max(SCORING * held.matrix + held.block * held.item for held in models),
        "final states": sum(held.kept_tokens * _hidden(held) * held.item for held in models),
        "activations": max(
            window_activations(_config(held), held.longest, False, held.item) for held in models
        ),
        "logits": max(
            logits_size(_config(held)) * (2 if held.kept_tokens else 1) for held in models
        ),
    }


def collecting(models: Sequence[Held], leaves: frozenset[str], memory: Memory) -> Rows:
    """Return a worker's device memory while statistics are collected, block by block."""
    backward = bool(need_backward(leaves))
    return {
        **_resident(models, memory),
        "sums": max(_sums(held, leaves) for held in models),
        "gradients": backward * max(2 * held.matrix * held.item for held in models),
        "activations": max(
            window_activations(_config(held), held.calibration_length, backward, held.item)
            for held in models
        ),
        "logits": max(logits_size(_config(held)) for held in models),
    }


def statistics_size(model: PreTrainedModel, leaves: frozenset[str], dtype: str) -> int:
    """Return the bytes of a model's statistics: matrices in a dtype, vectors in fp32."""
    total = 0
    for name, block in decoder_blocks(model).items():
        for layer in layers_of_block(name, block).values():
            for leaf in leaves & STATISTICS:
                shape = LEAVES[leaf].shape
                rows = layer.out_features if shape.by_row else 1
                columns = layer.in_features if shape.by_column else 1
                total += rows * columns * (DTYPES[dtype].itemsize if shape == MATRIX else 4)
    return total


def master_size(models: Sequence[Held]) -> int:
    """Return the bytes of the copies of the models' prunable weights."""
    return sum(held.prunable * held.item for held in models)


def device_line(needs: Needs, available: float | None) -> str:
    """Return a worker's device memory, in one line.

    Args:
        available: Bytes available to it; None if unknown.

    Raises:
        ValueError: If it does not fit; one line with what is needed and what is available.
    """
    total = sum(needs.device.values())
    parts = _in_words(needs.device)
    if available is not None and total > available:
        raise ValueError(
            f"a worker's device must have {size_text(total, up=True)} ({parts}), got "
            f"{size_text(available)}: set memory.scores=recompute, memory.statistics=bfloat16 or "
            "memory.master=host, or take a smaller dtype or shorter windows"
        )
    limit = "an unknown size: state ray.gpu_memory"
    if available is not None:
        limit = size_text(available)
    return f"memory: device of a worker {size_text(total)} of {limit}: {parts}"


def host_lines(needs: Needs, workers: int | None, available: float) -> list[str]:
    """Return the memory of a node's host, in lines.

    Args:
        workers: Workers on this machine; None if they run elsewhere.
        available: Free bytes on this machine.

    Raises:
        ValueError: If the workers are on this machine and do not fit.
    """
    per_worker, per_node = sum(needs.worker.values()), sum(needs.node.values())
    lines = [
        f"memory: host of a worker {size_text(per_worker)}: {_in_words(needs.worker)}",
        f"memory: host of a node {size_text(per_node)} plus its workers: {_in_words(needs.node)}",
    ]
    if workers is None:
        return lines
    total, free = needs.host(workers), size_text(available)
    noun = "worker" if workers == 1 else "workers"
    if total > available:
        raise ValueError(
            f"this machine must have {size_text(total, up=True)} free for {workers} {noun} "
            f"({size_text(per_worker)} each, and {_in_words(needs.node)}), got {free}: lower "
            "ray.workers, take fewer calibration windows, a smaller dtype or model"
        )
    return [*lines, f"memory: host with {workers} {noun} {size_text(total)} of {free}"]


def _resident(models: Sequence[Held], memory: Memory) -> Rows:
    return {
        "model": sum(held.parameters * held.item for held in models),
        "master copy": master_size(models) * (memory.master == "device"),
    }


def _states(held: Held, leaves: frozenset[str]) -> int:
    """Return the bytes of hidden states kept on the host while statistics are collected."""
    kept = len(decoder_blocks(held.model)) if need_backward(leaves) else 1
    load = Load(held.calibration, 0, held.calibration_length)
    return states_size(_config(held), load, kept, held.item)


def _sums(held: Held, leaves: frozenset[str]) -> int:
    """Return the bytes of the sums of the block with the largest."""
    blocks = decoder_blocks(held.model).items()
    return max(sums_size(layers_of_block(*block).values(), leaves) for block in blocks)


def _config(held: Held) -> PretrainedConfig:
    return held.model.config.get_text_config()


def _hidden(held: Held) -> int:
    return int(_config(held).hidden_size)


def _in_words(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in rows.items() if size)
