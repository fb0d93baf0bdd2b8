"""Perplexity of a causal language model on token windows.

A window of T tokens has T - 1 predictions. Its mean NLL is over those, and the perplexity of N
equally long windows is exp of the mean of the N means. (The mean of the windows' perplexities
would be a different, larger number.)
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional


@torch.inference_mode()
def window_losses(
    states: Iterable[Tensor],
    logits: Callable[[Tensor], Iterable[Tensor]],
    windows: Tensor,
    on_window: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return each window's mean NLL in nats per predicted token, (N,), fp64 on the CPU.

    Args:
        states: What enters the head for each window, (T, hidden_size).
        logits: Makes logits of states, some tokens' at a time, (tokens, vocabulary) in fp32: a
            batch's would dwarf everything else in memory.
        windows: Token ids, (N, T) with T of 2 or more.
        on_window: Called after each window with the number of windows done.
    """
    losses = []
    for done, (hidden, window) in enumerate(zip(states, windows, strict=True), 1):
        targets, start = window[1:].to(hidden.device), 0
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in logits(hidden[:-1]):
            end = start + len(part)
            total += functional.cross_entropy(part, targets[start:end], reduction="sum")
            start = end
        losses.append(total.item() / len(targets))
        on_window(done)
    return torch.tensor(losses, dtype=torch.float64)


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of per-window losses in nats per token; inf if that overflows."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_error(losses: Tensor) -> float | None:
    """Return the standard error of `perplexity`; None for a single window.

    By the delta method it is exp(m) s / sqrt(n), with the mean m and the standard deviation s of n
    windows' losses: exp's slope at m times the standard error of m.
    """
    error = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None
    return None if error is None else perplexity(losses) * error
