"""Calibration statistics: X from forward hooks, G from backward passes, streamed window by window.

Definitions are those of the Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924). Both are
sums over windows, kept in fp32 whatever the weights' dtype; no window's values are stored.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

GRADIENT_FACTOR = 100.0
"""The release multiplies gradients by this before it squares them, to fit them into fp16."""

STATISTICS = frozenset({"X", "G"})
"""The leaves of a metric that need calibration windows."""


@dataclass(frozen=True)
class Statistics:
    """Statistics by layer name.

    Attributes:
        X: Mean over windows of each input channel's squared L2 norm over tokens,
            (1, in_features), fp32.
        G: Root of the sum over windows of the squared gradient of the mean NLL (nats per token),
            the gradient times 100, (out_features, in_features), fp32.
    """

    X: Mapping[str, Tensor] = field(default_factory=dict)
    G: Mapping[str, Tensor] = field(default_factory=dict)


def collect(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    windows: Tensor,
    leaves: frozenset[str],
    on_window: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Collect the statistics that `leaves` names, from one pass over the windows.

    Args:
        model: A causal language model; its weights are not changed.
        layers: The layers to watch, by name.
        windows: Token ids, (N, T); one forward pass each, and one backward pass if G is asked.
        leaves: The statistics wanted; those other than X and G are ignored.
        on_window: Called after each window with the number done.
    """
    needs_gradient = "G" in leaves
    with (
        activation_sums(layers if "X" in leaves else {}) as X,
        gradient_sums(model, layers if needs_gradient else {}) as G,
        torch.set_grad_enabled(needs_gradient),
    ):
        for done, window in enumerate(windows.to(model.device), 1):
            ids = window[None]
            if needs_gradient:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            elif X:
                model.base_model(input_ids=ids, use_cache=False)
            on_window(done)
    for total in X.values():
        total /= len(windows)
    for total in G.values():
        total.sqrt_()
    return Statistics(X, G)


@contextmanager
def activation_sums(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While open, add up each layer's squared inputs per channel over all tokens, (1, in)."""
    sums = {
        name: torch.zeros(1, layer.in_features, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def watch(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            tokens = inputs[0].detach().reshape(-1, total.shape[1]).float()  # (tokens, in)
            total.add_(tokens.square().sum(0, keepdim=True))

        return add

    handles = [layers[name].register_forward_pre_hook(watch(sums[name])) for name in layers]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradient_sums(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear]
) -> Iterator[dict[str, Tensor]]:
    """While open, add up each weight's squared gradient times 100, (out, in).

    A gradient is added as soon as it is there and then freed, so that at no time all layers'
    gradients are held.
    """
    sums = {name: torch.zeros_like(w.weight, dtype=torch.float32) for name, w in layers.items()}
    wanted_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)

    def watch(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            scaled = weight.grad.float().mul_(GRADIENT_FACTOR)
            total.addcmul_(scaled, scaled)
            weight.grad = None

        return add

    handles = []
    for name, layer in layers.items():
        layer.weight.requires_grad_(True)
        handles.append(layer.weight.register_post_accumulate_grad_hook(watch(sums[name])))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in wanted_before.items():
            parameter.requires_grad_(wanted)
