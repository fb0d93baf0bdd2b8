"""How far a pruned model's next-token distributions are from the dense model's.

The dense model's final hidden states are kept, not its logits: a vocabulary is tens to hundreds
of times as wide, and one product with the head, which is never pruned, gives the logits back. So
the memory is bounded by tokens x hidden size, whatever the vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.perplexity import CHUNK_TOKENS, logits_of


@torch.inference_mode()
def final_hidden(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the states that enter the head, (N, T - 1, hidden_size), in the model's dtype."""
    states = [
        model.base_model(input_ids=window[None], use_cache=False)[0][0, :-1]
        for window in windows.to(model.device)
    ]
    return torch.stack(states)


@torch.inference_mode()
def window_divergences(model: PreTrainedModel, windows: Tensor, dense: Tensor) -> Tensor:
    """Return each window's mean KL divergence of the dense model's distribution to the model's.

    The objective of EvoPress (Sieberling et al., 2024, arXiv:2410.14649, Section 4).

    Args:
        model: A causal language model; its head is the dense model's.
        windows: Token ids, (N, T).
        dense: `final_hidden` of the dense model on the same windows.

    Returns:
        Mean over predicted tokens of sum_v p_dense log(p_dense / p), nats, (N,), fp64 on the CPU.
    """
    divergences = []
    for window, reference in zip(windows.to(model.device), dense, strict=True):
        hidden = model.base_model(input_ids=window[None], use_cache=False)[0][0, :-1]
        total = 0.0
        for start in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            own = torch.log_softmax(logits_of(model, hidden[chunk]), -1)
            theirs = torch.log_softmax(logits_of(model, reference[chunk]), -1)
            total += torch.sum(theirs.exp() * (theirs - own)).item()
        divergences.append(total / len(hidden))
    return torch.tensor(divergences, dtype=torch.float64)
