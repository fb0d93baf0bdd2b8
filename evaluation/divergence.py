"""How far a pruned model's next-token distributions are from the dense model's.

The dense model's final hidden states are kept, not its logits: a vocabulary is tens to hundreds
of times as wide, and one product with the head, which is never pruned, gives the logits back. So
the memory is bounded by tokens x hidden size, whatever the vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.perplexity import logits_in_parts


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
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        both = zip(logits_in_parts(model, hidden), logits_in_parts(model, reference), strict=True)
        for own, theirs in both:
            own, theirs = torch.log_softmax(own, -1), torch.log_softmax(theirs, -1)
            total += torch.sum(theirs.exp() * (theirs - own))
        divergences.append(total.item() / len(hidden))
    return torch.tensor(divergences, dtype=torch.float64)
