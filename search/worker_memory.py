"""What the workers of a search hold, said before any work: on a device, and on a node's host.

Sizes are bytes and follow from the models' shapes; activations, libraries and CUDA's own are
estimates from above. Nothing here looks at a machine.
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
"""What CUDA's context and its libraries' workspaces take of a device."""

_COMPARED = 2
"""Formulas whose scores are kept at one time: the report compares the winner's masks to others."""

Rows = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Held:
    """A model that every worker holds, and the texts that it reads.

    Attributes:
        model: Its shapes; no value is looked at.
        dtype: Of its passes, a key of `DTYPES`.
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
        """Parameters in all, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def prunable(self) -> int:
        """Weights that are pruned."""
        return sum(sum(sizes) for sizes in self._blocks())

    @property
    def block(self) -> int:
        """Prunable weights of the largest block."""
        return max(sum(sizes) for sizes in self._blocks())

    @property
    def matrix(self) -> int:
        """Weights of the largest prunable matrix."""
        return max(max(sizes) for sizes in self._blocks())

    def _blocks(self) -> list[list[int]]:
        return [
            [layer.weight.numel() for layer in layers_of_block(name, block).values()]
            for name, block in decoder_blocks(self.model).items()
        ]


@dataclass(frozen=True)
class Needs:
    """Bytes by what they are for.

    Attributes:
        device: A worker's, on its GPU; empty where workers run on the CPU.
        worker: A worker's, on the host.
        node: On the host once, however many workers there are.
    """

    device: Rows
    worker: Rows
    node: Rows

    def host(self, workers: int) -> int:
        """Return the bytes of the host that a node with so many workers needs."""
        return sum(self.node.values()) + workers * sum(self.worker.values())


def needs_of(
    held: Sequence[Held],
    leaves: frozenset[str],
    memory: Memory,
    whole_model: bool,
    on_gpu: bool,
    by_ray: bool,
) -> Needs:
    """Return what the workers of a search need.

    Args:
        held: The models.
        leaves: The leaves that metrics may name.
        memory: What is held beside the models, and where.
        whole_model: Whether a metric may prune under one threshold over the model.
        on_gpu: Whether workers run on GPUs.
        by_ray: Whether workers are processes of their own, and get the statistics from Ray.
    """
    leaves &= STATISTICS
    phases = [evaluating(held, leaves, memory, whole_model), collecting(held, leaves, memory)]
    if not on_gpu:
        # The host is the device there.
        phases = [phase | {"master copy": master_size(held)} for phase in phases]
    statistics = sum(statistics_size(one.model, leaves, memory.statistics) for one in held)
    node = {
        "statistics in Ray's object store": statistics * by_ray,
        "the driver": int(LIBRARIES) * by_ray + statistics * (2 if by_ray else 1),
        "collecting": statistics + max(_states(one, leaves) for one in held),
    }
    if on_gpu:
        device = max(phases, key=lambda rows: sum(rows.values())) | {"CUDA": CUDA}
        worker = {
            "libraries": int(LIBRARIES),
            # The process keeps that memory: see `pruning.memory`.
            "model while it is loaded": sum(one.parameters * one.item for one in held),
            "master copy": master_size(held) * (memory.master == "host"),
        }
        return Needs(device, worker, node)
    # Workers look at the statistics in the object store, or at those that were collected.
    worker = {"libraries": int(LIBRARIES), **phases[0], "statistics": 0}
    more = sum(phases[1].values()) - sum(worker.values()) + worker["libraries"]
    node["collecting"] += max(0, more)
    return Needs({}, worker, node)


def evaluating(
    held: Sequence[Held], leaves: frozenset[str], memory: Memory, whole_model: bool
) -> Rows:
    """Return what a worker's device holds while candidates are scored and measured."""
    keeps = whole_model and memory.scores == "keep"
    kept = max(4 * _COMPARED * one.prunable for one in held) if keeps else 0
    return {
        **_resident(held, memory),
        "statistics": sum(statistics_size(one.model, leaves, memory.statistics) for one in held),
        "scores": kept + max(SCORING * one.matrix + one.block * one.item for one in held),
        "final states": sum(one.kept_tokens * _hidden(one) * one.item for one in held),
        "activations": max(
            window_activations(_config(one), one.longest, False, one.item) for one in held
        ),
        "logits": max(logits_size(_config(one)) * (2 if one.kept_tokens else 1) for one in held),
    }


def collecting(held: Sequence[Held], leaves: frozenset[str], memory: Memory) -> Rows:
    """Return what a worker's device holds while statistics are collected, block by block."""
    backward = bool(need_backward(leaves))
    return {
        **_resident(held, memory),
        "sums": max(_sums(one, leaves) for one in held),
        "gradients": backward * max(2 * one.matrix * one.item for one in held),
        "activations": max(
            window_activations(_config(one), one.calibration_length, backward, one.item)
            for one in held
        ),
        "logits": max(logits_size(_config(one)) for one in held),
    }


def statistics_size(model: PreTrainedModel, leaves: frozenset[str], dtype: str) -> int:
    """Return bytes of a model's statistics: matrices in a dtype, vectors in fp32."""
    total = 0
    for name, block in decoder_blocks(model).items():
        for layer in layers_of_block(name, block).values():
            for leaf in leaves & STATISTICS:
                shape = LEAVES[leaf].shape
                rows = layer.out_features if shape.by_row else 1
                columns = layer.in_features if shape.by_column else 1
                total += rows * columns * (DTYPES[dtype].itemsize if shape == MATRIX else 4)
    return total


def master_size(held: Sequence[Held]) -> int:
    """Return bytes of the copies of the models' prunable weights."""
    return sum(one.prunable * one.item for one in held)


def device_line(needs: Needs, there: float | None) -> str:
    """Return what a worker's device holds, in one line.

    Args:
        there: Bytes that are there for it; None if that is not known.

    Raises:
        ValueError: If it does not fit; one line with what is needed and what is there.
    """
    total = sum(needs.device.values())
    parts = _in_words(needs.device)
    if there is not None and total > there:
        raise ValueError(
            f"a worker's device must have {size_text(total, up=True)} ({parts}), got "
            f"{size_text(there)}: set memory.scores=recompute, memory.statistics=bfloat16 or "
            "memory.master=host, or take a smaller dtype or shorter windows"
        )
    limit = "a size not known here: state ray.gpu_memory" if there is None else size_text(there)
    return f"memory: device of a worker {size_text(total)} of {limit}: {parts}"


def host_lines(needs: Needs, workers: int | None, there: float) -> list[str]:
    """Return what the host of a node holds, in lines.

    Args:
        workers: On this machine; None if they run elsewhere.
        there: Bytes that this machine has free.

    Raises:
        ValueError: If the workers are on this machine and do not fit.
    """
    one, once = sum(needs.worker.values()), sum(needs.node.values())
    lines = [
        f"memory: host of a worker {size_text(one)}: {_in_words(needs.worker)}",
        f"memory: host of a node {size_text(once)} beside its workers: {_in_words(needs.node)}",
    ]
    if workers is None:
        return lines
    total, noun = needs.host(workers), "worker" if workers == 1 else "workers"
    if total > there:
        raise ValueError(
            f"this machine must have {size_text(total, up=True)} free for {workers} {noun} "
            f"({size_text(one)} each, and {_in_words(needs.node)}), got {size_text(there)}: lower "
            "ray.workers, take fewer calibration windows, a smaller dtype or model"
        )
    return [*lines, f"memory: host with {workers} {noun} {size_text(total)} of {size_text(there)}"]


def _resident(held: Sequence[Held], memory: Memory) -> Rows:
    return {
        "model": sum(one.parameters * one.item for one in held),
        "master copy": master_size(held) * (memory.master == "device"),
    }


def _states(one: Held, leaves: frozenset[str]) -> int:
    """Return bytes of the hidden states that wait on the host while statistics are collected."""
    kept = len(decoder_blocks(one.model)) if need_backward(leaves) else 1
    load = Load(one.calibration, 0, one.calibration_length)
    return states_size(_config(one), load, kept, one.item)


def _sums(one: Held, leaves: frozenset[str]) -> int:
    """Return bytes of the sums of the block that has most of them."""
    blocks = decoder_blocks(one.model).items()
    return max(sums_size(layers_of_block(*block).values(), leaves) for block in blocks)


def _config(one: Held) -> PretrainedConfig:
    return one.model.config.get_text_config()


def _hidden(one: Held) -> int:
    return int(_config(one).hidden_size)


def _in_words(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in rows.items() if size)
