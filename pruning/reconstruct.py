"""Reconstruction: the weights that stay of a pruned block are trained to give the dense outputs.

As in arXiv:2510.14444: one block at a time, its masks fixed, on a few calibration windows. Its
inputs are what the pruned blocks before it give; its targets are the dense block's outputs behind
dense blocks, so errors from before are made up for, too. First the layers of its attention are
trained, then those of its MLP.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Lesson:
    """What one block is trained on.

    Attributes:
        windows: How many there are.
        input: Returns a window's states that enter the block behind pruned blocks, (1, T, hidden).
        target: Returns what the dense block gives behind dense blocks, of the same shape.
        run: Runs a block, or what takes its place, on such states.
    """

    windows: int
    input: Callable[[int], Tensor]
    target: Callable[[int], Tensor]
    run: Callable[[Callable[..., object], Tensor], Tensor]


RATE = 0.02
"""Adam's first step size, as a multiple of the root mean square of a layer's weights that stay: so
it has no unit. It falls linearly to zero."""

EPOCHS = 2
"""Eight with half the rate give the same perplexity, in four times the time (docs/LOG.md)."""

MOST_WINDOWS = 32
"""Windows at most, drawn anew for each block: more cost time."""

HELD_BACK = 8
"""One window in so many is not trained on: it tells when to stop."""


_LEAST_VARIANCE = 1e-6
"""Added to the variance of a channel, as a fraction of the mean of all."""

Errors = Mapping[str, Sequence[float]]
"""By part of a block: squared errors over the channel's variance in the target, mean over channels
and the windows held back, before the training and after each epoch. The lowest is that of the
weights that are kept. Without this weighting the few channels with huge values, of which the next
norm makes little, decide: Gemma-3-270M then gets worse (docs/LOG.md)."""


Training = Callable[
    [str, nn.Module, Mapping[str, Tensor], Lesson], tuple[dict[str, Tensor], Errors]
]
"""Maps a block's name, the block, its layers' new weights and what it is trained on to the weights
that are saved, whose zeros are the same, and the errors on the way."""


class Reconstruction:
    """Trains the layers of one block after the other; see the module.

    Args:
        seed: Of the choice of windows and of their order.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def __call__(
        self, block: str, module: nn.Module, weights: Mapping[str, Tensor], lesson: Lesson
    ) -> tuple[dict[str, Tensor], Errors]:
        """Return the weights of a block's layers, fp32, zero where the given ones are, and errors.

        Args:
            block: The block's name.
            module: The block, in the dtype of the passes; it is not changed.
            weights: The pruned weights of its layers, by name.
            lesson: The windows; with fewer than two nothing is trained.
        """
        device = next(module.parameters()).device
        trained = {name: weight.to(device, torch.float32) for name, weight in weights.items()}
        by_part = groupby(weights, lambda name: name.removeprefix(f"{block}.").split(".")[0])
        parts = {part: list(names) for part, names in by_part} if lesson.windows > 1 else {}
        errors = {}
        for part, names in parts.items():
            changed, errors[part] = self._train(block, module, trained, names, lesson)
            trained |= changed
        return trained, errors

    def _train(
        self,
        block: str,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        names: Sequence[str],
        lesson: Lesson,
    ) -> tuple[dict[str, Tensor], list[float]]:
        """Return new weights of some of a block's layers, and their errors."""
        prefix, dtype = len(block) + 1, next(module.parameters()).dtype

        def parameters_of(some: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {f"{name[prefix:]}.weight": weight.to(dtype) for name, weight in some.items()}

        others = parameters_of({name: weights[name] for name in weights if name not in names})

        def error(changed: Mapping[str, Tensor], window: int) -> Tensor:
            replaced = partial(_call, module, others | parameters_of(changed))
            target = lesson.target(window).float().flatten(0, -2)  # (tokens, channels)
            output = lesson.run(replaced, lesson.input(window)).float().flatten(0, -2)
            variance = target.var(0, correction=0)
            scale = variance + _LEAST_VARIANCE * variance.mean()
            return ((output - target).square().mean(0) / scale).mean()

        stays = {name: weights[name] != 0 for name in names}
        free = {name: weights[name].clone().requires_grad_() for name in names}
        adam = torch.optim.Adam([{"params": [w], "lr": _rate(w)} for w in free.values()])
        order = random.Random(f"{self._seed} {block}")
        windows = order.sample(range(lesson.windows), min(lesson.windows, MOST_WINDOWS))
        held = windows[::HELD_BACK]
        taught = [window for window in windows if window not in held]
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, EPOCHS * len(taught))
        kept = {name: weights[name] for name in names}
        errors = [_mean_error(error, kept, held)]
        for _ in range(EPOCHS):
            order.shuffle(taught)
            for window in taught:
                with torch.enable_grad():
                    changed = {name: weight * stays[name] for name, weight in free.items()}
                    gradients = torch.autograd.grad(error(changed, window), list(free.values()))
                for weight, gradient in zip(free.values(), gradients, strict=True):
                    weight.grad = gradient
                adam.step()
                schedule.step()
            changed = {name: weight.detach() * stays[name] for name, weight in free.items()}
            errors.append(_mean_error(error, changed, held))
            if errors[-1] > min(errors):
                break
            kept = changed
        return kept, errors


def _call(
    module: nn.Module, parameters: Mapping[str, Tensor], *arguments: object, **keywords: object
) -> object:
    return functional_call(module, dict(parameters), arguments, keywords)


def _rate(weight: Tensor) -> float:
    stays = weight.detach()[weight != 0]
    return RATE * float(stays.square().mean().sqrt()) if len(stays) else 0.0


@torch.no_grad()
def _mean_error(
    error: Callable[[Mapping[str, Tensor], int], Tensor],
    weights: Mapping[str, Tensor],
    windows: Sequence[int],
) -> float:
    return fmean(float(error(weights, window)) for window in windows)
