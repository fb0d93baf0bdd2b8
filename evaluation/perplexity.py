"""Perplexity of a causal language model on token windows.

A window of T tokens has T - 1 predictions, its mean NLL is over those, and the perplexity of N
equally long windows is exp of the mean of the N means. (The mean of the windows' perplexities
would be another, larger number.) Logits are made for a chunk of positions at a time, since those
of a whole batch over a large vocabulary dwarf everything else in memory.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

CHUNK_TOKENS = 256
"""Positions whose logits exist at one time."""


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel, windows: Tensor, on_window: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Return each window's mean negative log-likelihood.

    Args:
        model: A causal language model on any device.
        windows: Token ids, (N, T) with T of 2 or more; one forward pass each.
        on_window: Called after each window with the number done.

    Returns:
        Mean NLL in nats per predicted token, (N,), fp64 on the CPU.
    """
    losses = []
    for done, window in enumerate(windows.to(model.device), 1):
        hidden = model.base_model(input_ids=window[None], use_cache=False)[0][0, :-1]
        losses.append(_mean_nll(model, hidden, window[1:]))
        on_window(done)
    return torch.tensor(losses, dtype=torch.float64)


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of per-window losses in nats per token; inf where that overflows."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def logits_in_parts(model: PreTrainedModel, hidden: Tensor) -> Iterator[Tensor]:
    """Yield the logits of final hidden states, (T, hidden_size), in order, a few tokens at a time.

    Each part is (tokens, vocabulary) in fp32. On the CPU parts are so small that what is done with
    them stays in the cache.
    """
    head = model.get_output_embeddings()
    # As the model's own forward does: Gemma3ForConditionalGeneration ignores its text part's cap.
    cap = getattr(model.config, "final_logit_softcapping", None)
    tokens = 32 if hidden.device.type == "cpu" else CHUNK_TOKENS
    for chunk in hidden.split(CHUNK_TOKENS):
        for part in head(chunk).split(tokens):
            logits = part.float()
            yield cap * torch.tanh(logits / cap) if cap else logits


def _mean_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> float:
    """Return the mean NLL of targets, (T - 1,), under hidden states, (T - 1, hidden_size)."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    start = 0
    for logits in logits_in_parts(model, hidden):
        part = targets[start : start + len(logits)]
        total += functional.cross_entropy(logits, part, reduction="sum")
        start += len(logits)
    return total.item() / len(targets)
