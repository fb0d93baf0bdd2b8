"""How far a pruned model's next-token distributions are from the dense model's.

The dense model's final hidden states are kept rather than its logits: a vocabulary is tens to
hundreds of times as wide, and one product with the head, which is never pruned, recovers the
logits. So memory is bounded by tokens x hidden size, whatever the vocabulary.
"""

import torch
from torch import Tensor

from evaluation.perplexity import LanguageModel


@torch.inference_mode()
def final_hidden(model: LanguageModel, windows: Tensor) -> Tensor:
    """Return the states that enter the head, (N, T - 1, hidden_size), in the model's dtype."""
    return torch.stack([states[:-1] for states in model.states(windows)])


@torch.inference_mode()
def window_divergences(model: LanguageModel, windows: Tensor, dense: Tensor) -> Tensor:
    """Return each window's mean KL divergence from the dense model to the model.

    The objective of EvoPress (Sieberling et al., 2024, arXiv:2410.14649, Section 4).

    Args:
        model: A causal language model; its head is the dense model's.
        windows: Token ids, (N, T).
        dense: `final_hidden` of the dense model on the same windows.

    Returns:
        Mean over predicted tokens of sum_v p_dense log(p_dense / p), nats, (N,), fp64 on the CPU.
    """
    divergences = []
    for states, reference in zip(model.states(windows), dense, strict=True):
        hidden = states[:-1]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        both = zip(model.logits(hidden), model.logits(reference), strict=True)
        for logits, dense_logits in both:
            log_p, log_dense = torch.log_softmax(logits, -1), torch.log_softmax(dense_logits, -1)
            total += torch.sum(log_dense.exp() * (log_dense - log_p))
        divergences.append(total.item() / len(hidden))
    return torch.tensor(divergences, dtype=torch.float64)
