"""Causal attention in short blocks of queries: fast on the CPU, repeatable on a GPU.

torch's kernel for the CPU computes in fp32 and skips little; two batched matrix products on a block
of queries and the keys before it use bf16 instructions, leave out half of the work and take a third
of the time. On a GPU torch's kernel is faster, but its gradients are sums in an order that changes
from run to run: it is used where no gradient is asked for, and for calls with a mask.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_blocked"

_QUERIES = 64
"""Queries in a block: few enough that a block's scores of all heads stay in the cache."""


def use_blocked_attention(model: PreTrainedModel) -> None:
    """Make a model that uses torch's attention compute it in blocks where that is better."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return causal attention, softmax(scaling * q k^T) v over the positions up to a query's own.

    Queries and result are (batch, heads, T, d), keys and values (batch, key heads, T, d), where
    heads are a multiple of key heads. Scores are in the queries' dtype, softmax is in fp32.
    """
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    # Query heads that share a key head are stacked, so that one matrix product serves all.
    query = (query * scaling).reshape(-1, shared, tokens, width)
    key = key.reshape(-1, tokens, key.shape[-1])
    value = value.reshape(-1, tokens, value.shape[-1])
    blocks = []
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        queries = query[:, :, start:end].reshape(-1, shared * (end - start), width)
        scores = torch.bmm(queries, key[:, :end].transpose(1, 2))
        scores = scores.reshape(-1, shared, end - start, end)
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
        scores[..., start:].masked_fill_(later, -torch.inf)
        weights = torch.softmax(scores, -1).reshape(-1, shared * (end - start), end)
        mixed = torch.bmm(weights, value[:, :end])
        blocks.append(mixed.reshape(-1, shared, end - start, value.shape[-1]))
    return torch.cat(blocks, 2).reshape(batch, heads, tokens, value.shape[-1])


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = mask is None and causal and not given.get("dropout") and not given.get("position_bias")
    in_blocks = query.device.type == "cpu" or query.requires_grad
    if not (plain and in_blocks and query.shape[2] == key.shape[2]):
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
        return output, None
    scaling = given.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scaling).transpose(1, 2).contiguous(), None
