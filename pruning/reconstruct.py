"""Reconstruction: the weights that stay of a pruned block are trained to give the dense outputs.

As in arXiv:2510.14444: one block at a time, its masks fixed, first the layers of its attention,
then those of its MLP. Its inputs are what the pruned blocks before it give; its targets are the
dense block's outputs behind dense blocks, so errors from before are made up for, too.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.func import functional_call

Block = Callable[..., Tensor | tuple[Tensor, ...]]  # a decoder block, or what takes its place


@dataclass(frozen=True)
class Examples:
    """What one block is trained on: states of windows, (1, T, hidden_size)."""

    windows: int
    input: Callable[[int], Tensor]  # what enters the block behind pruned blocks, by window
    target: Callable[[int], Tensor]  # what the dense block gives behind dense blocks
    run: Callable[[Block, Tensor], Tensor]  # runs a block, or one in its place


# Adam's first step size, as a multiple of the root mean square of a layer's weights that stay: so
# it has no unit. It falls linearly to zero.
RATE = 0.02
EPOCHS = 2  # eight with half the rate give the same perplexity in four times the time
# Fewer bring less than two thirds of what 32 do, and 128 more yet (docs/LOG.md: reconstruction with
# 8, 32 and 128 windows).
FEW_WINDOWS = 16
HELD_BACK = 8  # one window in so many is not trained on: it tells when to stop
_LEAST_VARIANCE = 1e-6  # added to that of a channel, as a fraction of the mean of all

Weights = Mapping[str, Tensor]

# By part of a block: squared errors over the channel's variance in the target, mean over channels
# and the windows held back, before the training and after each epoch. The lowest is that of what is
# kept. Unweighted, the few channels with huge values, of which the next norm makes little, decide:
# Gemma-3-270M then gets worse (docs/LOG.md: reconstruction with 8, 32 and 128 windows).
Errors = Mapping[str, Sequence[float]]

# Maps a block's name, the block, its layers' new weights and what it is trained on to the weights
# that are saved, whose zeros are the same, and the errors on the way.
Training = Callable[[str, nn.Module, Weights, Examples], tuple[dict[str, Tensor], Errors]]


def reconstruct(
    block: str, module: nn.Module, weights: Weights, examples: Examples, seed: int = 0
) -> tuple[dict[str, Tensor], Errors]:
    """Return the weights of a block's layers, fp32, zero where the pruned ones are, and errors.

    The module, in the dtype of the passes, is not changed. On fewer than two windows nothing is
    trained. The seed is that of the windows held back, and of the order of the others.
    """
    device = next(module.parameters()).device
    parameters = {name: f"{name.removeprefix(f'{block}.')}.weight" for name in weights}
    trained = {parameters[name]: weights[name].to(device, torch.float32) for name in weights}
    errors = {}
    if examples.windows > 1:
        for part, names in groupby(parameters.values(), lambda name: name.split(".")[0]):
            order = random.Random(f"{seed} {block}")
            changed, errors[part] = _train(module, trained, list(names), examples, order)
            trained |= changed
    return {name: trained[parameters[name]] for name in weights}, errors


def _train(
    module: nn.Module, weights: Weights, names: list[str], examples: Examples, order: random.Random
) -> tuple[dict[str, Tensor], list[float]]:
    """Return some of a module's parameters, trained, and their errors."""
    dtype = next(module.parameters()).dtype
    others = {name: weights[name].to(dtype) for name in weights if name not in names}
    kept = {name: weights[name] for name in names}

    def error(changed: Weights, window: int) -> Tensor:
        replaced = others | {name: weight.to(dtype) for name, weight in changed.items()}
        output = examples.run(
            lambda *arguments, **keywords: functional_call(module, replaced, arguments, keywords),
            examples.input(window),
        )
        target = examples.target(window).float().flatten(0, -2)  # (tokens, channels)
        variance = target.var(0, correction=0)
        scale = variance + _LEAST_VARIANCE * variance.mean()
        return ((output.float().flatten(0, -2) - target).square().mean(0) / scale).mean()

    @torch.no_grad()
    def mean_error(changed: Weights) -> float:
        return fmean(float(error(changed, window)) for window in held_back)

    stays = {name: weight != 0 for name, weight in kept.items()}
    free = {name: weight.clone().requires_grad_() for name, weight in kept.items()}
    adam = torch.optim.Adam([{"params": [free[n]], "lr": _rate(w)} for n, w in kept.items()])
    windows = order.sample(range(examples.windows), examples.windows)
    held_back = windows[::HELD_BACK]
    trained_on = [window for window in windows if window not in held_back]
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, EPOCHS * len(trained_on))
    errors = [mean_error(kept)]
    for _ in range(EPOCHS):
        order.shuffle(trained_on)
        for window in trained_on:
            with torch.enable_grad():
                changed = {name: weight * stays[name] for name, weight in free.items()}
                gradients = torch.autograd.grad(error(changed, window), list(free.values()))
            for weight, gradient in zip(free.values(), gradients, strict=True):
                weight.grad = gradient
            adam.step()
            schedule.step()
        changed = {name: weight.detach() * stays[name] for name, weight in free.items()}
        errors.append(mean_error(changed))
        if not errors[-1] <= min(errors):  # NaN, too
            break
        kept = changed
    return kept, errors


def _rate(weight: Tensor) -> float:
    stays = weight[weight != 0]
    return RATE * float(stays.square().mean().sqrt()) if len(stays) else 0.0
