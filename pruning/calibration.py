"""Calibration statistics: from forward hooks and backward passes, streamed window by window.

X and G are defined as in the Pruner-Zero release (Dong et al., 2024, arXiv:2406.02924). All are
sums over windows, kept in fp32 whatever the weights' dtype; no window's values are stored.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.operators import LEAVES

GRADIENT_FACTOR = 100.0
"""The release multiplies gradients by this before it squares them, to fit them into fp16."""

STATISTICS = frozenset(LEAVES) - {"W"}
"""The leaves of a metric that need calibration windows."""

ACTIVATIONS = frozenset({"X", "A", "V"})
"""The statistics of a layer's inputs: they need forward passes alone."""

GRADIENTS = frozenset({"G", "B", "M"})
"""The statistics that need a backward pass for each window."""


@dataclass(frozen=True)
class Statistics:
    """Statistics by layer name, fp32; a mean over tokens is over all tokens of all windows.

    Attributes:
        X: Mean over windows of each input channel's squared L2 norm over tokens,
            (1, in_features).
        G: Root of the sum over windows of the squared gradient of the mean NLL (nats per token),
            the gradient times 100, (out_features, in_features).
        A: Mean over tokens of each input channel's absolute activation, (1, in_features).
        V: Population variance over tokens of each input channel's activation, (1, in_features).
        B: Root of the mean over tokens of the squared gradient of the window's mean NLL with
            respect to each output, the gradient times 100, (out_features, 1).
        M: Sum over windows of minus the gradient times 100 along the weight's sign, (out_features,
            in_features): above 0 where the loss falls as the weight moves away from 0. W times M
            is, up to the factor, what the loss gains to first order by keeping the weight
            (Sanh et al., 2020, arXiv:2005.07683, Section 4, on a model that is not trained).
    """

    X: Mapping[str, Tensor] = field(default_factory=dict)
    G: Mapping[str, Tensor] = field(default_factory=dict)
    A: Mapping[str, Tensor] = field(default_factory=dict)
    V: Mapping[str, Tensor] = field(default_factory=dict)
    B: Mapping[str, Tensor] = field(default_factory=dict)
    M: Mapping[str, Tensor] = field(default_factory=dict)

    def leaf(self, name: str) -> Mapping[str, Tensor]:
        """Return one statistic by layer name; empty if it was not collected."""
        assert name in STATISTICS, name
        found: Mapping[str, Tensor] = getattr(self, name)
        return found

    def of(self, layer: str) -> dict[str, Tensor]:
        """Return what is there of one layer by leaf, as `Metric.score` takes it."""
        return {
            name: self.leaf(name)[layer] for name in sorted(STATISTICS) if layer in self.leaf(name)
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all statistics by `X/layer`, `G/layer` and so on, as they are stored and sent."""
        return {
            f"{name}/{layer}": tensor
            for name in sorted(STATISTICS)
            for layer, tensor in self.leaf(name).items()
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], device: str = "cpu") -> "Statistics":
        """Rebuild statistics from `to_tensors` on a device."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in STATISTICS}
        for key, tensor in tensors.items():
            name, layer = key.split("/", 1)
            parts[name][layer] = tensor.to(device)
        return Statistics(**parts)


class InputSums:
    """Running sums over the tokens that enter one layer, for those of X, A and V that are asked."""

    def __init__(self, layer: nn.Linear, leaves: frozenset[str]) -> None:
        zeros = torch.zeros(1, layer.in_features, device=layer.weight.device)
        self.tokens = 0
        self._sums = {name: zeros.clone() for name in sorted(leaves & ACTIVATIONS)}
        self._mean = zeros

    def add(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Add a call's tokens; a forward pre-hook."""
        tokens = inputs[0].detach()
        tokens = tokens.reshape(-1, tokens.shape[-1]).float()  # (tokens, in)
        if "X" in self._sums:
            self._sums["X"] += tokens.square().sum(0, keepdim=True)
        if "A" in self._sums:
            self._sums["A"] += tokens.abs().sum(0, keepdim=True)
        if "V" in self._sums:
            self._add_deviations(tokens)
        self.tokens += len(tokens)

    def _add_deviations(self, tokens: Tensor) -> None:
        # Squared deviations are merged call by call (Chan et al., 1983): the difference of the
        # mean square and the squared mean would cancel where a channel is far from zero.
        variance, mean = torch.var_mean(tokens, 0, correction=0, keepdim=True)
        share = len(tokens) / (self.tokens + len(tokens))
        apart = mean - self._mean
        self._sums["V"] += len(tokens) * (variance + apart.square() * (1 - share))
        self._mean = self._mean + apart * share

    def means(self, windows: int) -> dict[str, Tensor]:
        """Return X, A and V, those that were asked, of the tokens of a number of windows."""
        return {
            name: total / (windows if name == "X" else self.tokens)
            for name, total in self._sums.items()
        }


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
        windows: Token ids, (N, T); one forward pass each, and one backward pass if
            G, B or M is asked.
        leaves: The statistics wanted; leaves that are none are ignored.
        on_window: Called after each window with the number done.
    """
    needs_gradient = bool(leaves & GRADIENTS)
    with (
        input_sums(layers, leaves) as inputs,
        gradient_sums(model, layers, leaves) as gradients,
        output_gradient_sums(layers if "B" in leaves else {}) as B,
        torch.set_grad_enabled(needs_gradient),
    ):
        for done, window in enumerate(windows.to(model.device), 1):
            ids = window[None]
            if needs_gradient:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            elif inputs:
                model.base_model(input_ids=ids, use_cache=False)
            on_window(done)
    return Statistics(
        G={name: total.sqrt_() for name, total in gradients["G"].items()},
        M=gradients["M"],
        B={name: total.div_(windows.numel()).sqrt_() for name, total in B.items()},
        **activation_statistics(inputs, len(windows)),
    )


def activation_statistics(
    inputs: Mapping[str, InputSums], windows: int
) -> dict[str, dict[str, Tensor]]:
    """Return X, A and V by leaf and layer from the sums over a number of windows."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in sorted(ACTIVATIONS)}
    for layer, sums in inputs.items():
        for name, statistic in sums.means(windows).items():
            parts[name][layer] = statistic
    return parts


@contextmanager
def input_sums(
    layers: Mapping[str, nn.Linear], leaves: frozenset[str]
) -> Iterator[dict[str, InputSums]]:
    """While open, add up what enters each layer; no layer is watched if no leaf needs it."""
    watched = layers if leaves & ACTIVATIONS else {}
    sums = {name: InputSums(layer, leaves) for name, layer in watched.items()}
    handles = [layers[name].register_forward_pre_hook(sums[name].add) for name in sums]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def output_gradient_sums(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """While open, add up each output's squared gradient times 100 over tokens, (out, 1)."""
    sums = {
        name: torch.zeros(layer.out_features, 1, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def watch(total: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            scaled = gradient.reshape(-1, len(total)).float() * GRADIENT_FACTOR  # (tokens, out)
            total.add_(scaled.square().sum(0)[:, None])

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            # With frozen weights the first layers' outputs would have no gradient of their own.
            output.requires_grad_(True).register_hook(add)

        return hook

    handles = [layer.register_forward_hook(watch(sums[name])) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradient_sums(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], leaves: frozenset[str]
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """While open, add up G's squares and M, those that are asked, by leaf and layer, (out, in).

    A gradient is added as soon as it is there and then freed, so that at no time all layers'
    gradients are held.
    """
    sums: dict[str, dict[str, Tensor]] = {
        leaf: {
            name: torch.zeros_like(layer.weight, dtype=torch.float32)
            for name, layer in layers.items()
            if leaf in leaves
        }
        for leaf in ("G", "M")
    }
    wanted_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)

    def watch(name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            scaled = weight.grad.float().mul_(GRADIENT_FACTOR)
            if name in sums["G"]:
                sums["G"][name].addcmul_(scaled, scaled)
            if name in sums["M"]:
                sums["M"][name].addcmul_(scaled, weight.detach().sign().float(), value=-1)
            weight.grad = None

        return add

    handles = []
    for name in sums["G"] | sums["M"]:
        weight = layers[name].weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(watch(name)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in wanted_before.items():
            parameter.requires_grad_(wanted)
