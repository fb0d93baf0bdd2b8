"""Perplexity of a causal language model on token windows.

A window of T tokens has T - 1 predictions. Its mean NLL is over those, and the perplexity of N
equally long windows is exp of the mean of the N means. (The mean of the windows' perplexities
would be a different, larger number.) Logits are made for a few positions at a time, since those of
a whole batch over a large vocabulary would dwarf everything else in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LanguageModel(Protocol):
    """A causal language model, wherever its weights are."""

    def states(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield each window's states that enter the head, (T, hidden_size)."""

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield the logits of states in order, in fp32, some tokens at a time."""


@torch.inference_mode()
def window_losses(
    model: LanguageModel, windows: Tensor, on_window: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Return each window's mean negative log-likelihood.

    Args:
        windows: Token ids, (N, T) with T of 2 or more.
        on_window: Called after each window with the number of windows done.

    Returns:
        Mean NLL in nats per predicted token, (N,), fp64 on the CPU.
    """
    return losses_of(model.states(windows), model.logits, windows, on_window)


@torch.inference_mode()
def losses_of(
    states: Iterable[Tensor],
    logits: Callable[[Tensor], Iterable[Tensor]],
    windows: Tensor,
    on_window: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return what `window_losses` returns, from states that a model made of the windows."""
    losses = []
    for done, (hidden, window) in enumerate(zip(states, windows, strict=True), 1):
        losses.append(_mean_nll(logits(hidden[:-1]), window[1:].to(hidden.device)))
        on_window(done)
    return torch.tensor(losses, dtype=torch.float64)


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of per-window losses in nats per token; inf if that overflows."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def _mean_nll(logits: Iterable[Tensor], targets: Tensor) -> float:
    """Return the mean NLL of targets, (T - 1,), under logits in parts, (tokens, vocabulary)."""
    total = torch.zeros((), dtype=torch.float64, device=targets.device)
    start = 0
    for part in logits:
        total += functional.cross_entropy(part, targets[start : start + len(part)], reduction="sum")
        start += len(part)
    return total.item() / len(targets)
