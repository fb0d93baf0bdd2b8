"""Attention in short blocks of queries: fast on the CPU, repeatable on a GPU.

torch's kernel for the CPU computes in fp32 and skips little; two batched matrix products on a block
of queries and the keys before it use bf16 instructions, leave out half of the work and take a third
of the time. On a GPU torch's kernels are faster, but their gradients, with a mask or without, are
sums in an order that changes from run to run: they are used where no gradient is asked for.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_or_blocked"
_QUERIES = 64  # in a block: few enough that its scores of all heads stay in the cache


def use_blocked_attention(model: PreTrainedModel) -> None:
    """Make a model that uses torch's attention compute it in blocks where that is better."""
    # The latter was set in the process that sent the model to this one.
    if model.config._attn_implementation in ("sdpa", NAME):
        AttentionInterface.register(NAME, _attention_forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        # torch's kernels have no cap on the scores: transformers 5.6 leaves out Gemma 2's, unsaid.
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        model.set_attn_implementation("eager" if capped else NAME)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Return attention, softmax(scaling * q k^T) v, over the positions up to a query's own, or
    those where a mask, (batch or 1, 1, T, T), is True.

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
        keys, hidden = end, query.new_ones(end - start, end - start, dtype=torch.bool).triu(1)
        if mask is not None:
            keys, hidden = tokens, ~mask[..., start:end, :]
        scores = torch.bmm(queries, key[:, :keys].transpose(1, 2))
        scores = scores.reshape(batch, heads, end - start, keys)
        scores[..., keys - hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, -1).reshape(-1, shared * (end - start), keys)
        mixed = torch.bmm(weights, value[:, :keys])
        blocks.append(mixed.reshape(-1, shared, end - start, value.shape[-1]))
    return torch.cat(blocks, 2).reshape(batch, heads, tokens, value.shape[-1])


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **given: object,
) -> tuple[Tensor, None]:
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    sees = causal if mask is None else mask.dtype == torch.bool
    plain = sees and not given.get("dropout") and given.get("position_bias") is None
    in_blocks = mask is None if query.device.type == "cpu" else query.requires_grad
    if not (plain and in_blocks and query.shape[2] == key.shape[2]):
        output, _ = sdpa_attention_forward(
            module, query, key, value, mask, scaling=scaling, **given
        )
        return output, None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = blocked_attention(query, key, value, scaling, mask)
    return output.transpose(1, 2).contiguous(), None
