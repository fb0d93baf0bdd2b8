"""Running sums over calibration windows for the layers of one decoder block, by hooks.

A block is watched while windows run through it, forward or backward. Each leaf defines what is
added up, and how the sum becomes a statistic (`pruning.leaves`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from prunevolve.pruning.leaves import COLLECTED, GRADIENT_FACTOR, Seen, Statistics, Sum, made_of

_CHUNK = 1 << 17
"""Gradient elements added at a time: few enough that intermediate results stay in the cache."""

Sums = dict[str, dict[str, Sum]]
"""Running sums by layer and leaf."""


@contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Linear], leaves: frozenset[str], block: nn.Module
) -> Iterator[Sums]:
    """While open, add up what enters each layer, for the leaves that are made of inputs.

    Args:
        layers: The block's layers.
        block: Its input and output are watched too, for leaves such as the block's influence.
    """
    sums = _start(layers, made_of(leaves, "inputs"))

    def watch_block(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        cosines = functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
        for by_leaf in sums.values():
            _add_all(_part(by_leaf, of_block=True), cosines[..., None])

    handles = [
        layers[name].register_forward_pre_hook(partial(_watch_inputs, of_layer))
        for name in sums
        if (of_layer := _part(sums[name], of_block=False))
    ]
    if any(COLLECTED[leaf].of_block for leaf in leaves):
        handles.append(block.register_forward_hook(watch_block))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _part(sums: Mapping[str, Sum], of_block: bool) -> dict[str, Sum]:
    return {leaf: total for leaf, total in sums.items() if COLLECTED[leaf].of_block == of_block}


@contextmanager
def watched_gradients(layers: Mapping[str, nn.Linear], leaves: frozenset[str]) -> Iterator[Sums]:
    """While open, add up each backward pass's gradients, for the leaves that are made of them.

    The inputs of the layers must take part in the backward pass. A weight's gradient is added as
    soon as it is complete, and then freed.
    """
    of_outputs = _start(layers, made_of(leaves, "output gradients"))
    of_weights = _start(layers, made_of(leaves, "weight gradients"))
    handles = [
        layers[name].register_forward_hook(partial(_watch_output, of_layer))
        for name, of_layer in of_outputs.items()
    ]
    for name, of_layer in of_weights.items():
        weight = layers[name].weight.requires_grad_(True)
        hook = partial(_take_gradient, of_layer)
        handles.append(weight.register_post_accumulate_grad_hook(hook))
    try:
        yield {
            name: of_outputs.get(name, {}) | of_weights.get(name, {})
            for name in (of_outputs or of_weights)
        }
    finally:
        for handle in handles:
            handle.remove()
        for name in of_weights:
            layers[name].weight.requires_grad_(False)


def statistics_of(sums: Sums, windows: Tensor, depth: float = 0.0) -> Statistics:
    """Turn sums over windows, (N, T), into statistics; the sums cannot be used afterwards."""
    seen = Seen(len(windows), windows.numel(), depth)
    statistics: dict[str, dict[str, Tensor]] = {}
    for layer, by_leaf in sums.items():
        for leaf in list(by_leaf):
            statistics.setdefault(leaf, {})[layer] = by_leaf.pop(leaf).result(seen)
    return Statistics(statistics)


def _start(layers: Mapping[str, nn.Linear], leaves: frozenset[str]) -> Sums:
    if not leaves:
        return {}
    starts = {leaf: start for leaf in sorted(leaves) if (start := COLLECTED[leaf].start)}
    return {
        name: {leaf: start(layer) for leaf, start in starts.items()}
        for name, layer in layers.items()
    }


def _add_all(sums: Mapping[str, Sum], values: Tensor) -> None:
    """Add values whose last dimension is a layer's input or output, as (tokens, features)."""
    tokens = values.reshape(-1, values.shape[-1]).float()
    for total in sums.values():
        total.add(tokens, slice(None))


def _watch_inputs(sums: Mapping[str, Sum], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    _add_all(sums, inputs[0].detach())


def _watch_output(sums: Mapping[str, Sum], _: nn.Module, __: object, output: Tensor) -> None:
    output.register_hook(lambda gradient: _add_all(sums, gradient.float() * GRADIENT_FACTOR))


def _take_gradient(sums: Mapping[str, Sum], weight: Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    assert gradient is not None
    step = max(1, _CHUNK // gradient.shape[1])
    for start in range(0, len(gradient), step):
        rows = slice(start, start + step)
        scaled = gradient[rows].float() * GRADIENT_FACTOR
        for total in sums.values():
            total.add(scaled, rows)
