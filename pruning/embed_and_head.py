"""What is around the decoder blocks: embedding of the tokens, and the head's logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunevolve.pruning.models import decoder_blocks

HEAD_TOKENS = 256
"""Positions whose logits exist at one time: over a large vocabulary, a whole window's dwarf all."""


@dataclass(frozen=True)
class BlockCall:
    """All that one decoder block was called with besides the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the block's output hidden states, (batch, tokens, hidden_size)."""
        output = block(hidden, *self.arguments, **self.keywords)
        return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def block_inputs(model: PreTrainedModel, windows: Tensor) -> tuple[list[Tensor], list[BlockCall]]:
    """Return the hidden states that enter the first block, N of (1, T, hidden_size), and the call
    of every block, which depends on the windows' length alone; no block runs.

    Args:
        windows: Token ids, (N, T), on the model's device, without padding.
    """
    hidden = []
    with _stubs(model) as stubs:
        for window in windows:
            model.base_model(input_ids=window[None], use_cache=False)
            hidden.append(stubs[0].hidden)
    return hidden, [stub.call for stub in stubs if len(windows)]


def final_states(model: PreTrainedModel, window: Tensor, hidden: Tensor) -> Tensor:
    """Return what enters the head from what the last block returned, both (1, T, hidden_size).

    Gradients flow back. Of the window's token ids, (T,), only the number matters.
    """
    with _stubs(model, hidden):
        states: Tensor = model.base_model(input_ids=window[None], use_cache=False)[0]
    return states


def head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the logits, (T, vocabulary) in fp32, of states that enter the head, (T, hidden)."""
    return _capped(model, model.get_output_embeddings()(states))


def logits_in_parts(model: PreTrainedModel, states: Tensor) -> Iterator[Tensor]:
    """Yield what `head_logits` returns in parts, (tokens, vocabulary) each, in order."""
    head = model.get_output_embeddings()
    tokens = 32 if states.device.type == "cpu" else HEAD_TOKENS  # what stays in the CPU's cache
    for chunk in states.split(HEAD_TOKENS):
        for part in head(chunk).split(tokens):
            yield _capped(model, part)


def _capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    # As in the model's own forward: Gemma3ForConditionalGeneration ignores its text part's cap.
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


class _Stub(nn.Module):
    """Replaces a decoder block: records its call and returns its input, or a given tensor."""

    def __init__(self, returned: Tensor | None = None) -> None:
        super().__init__()
        self._returned = returned

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.hidden, self.call = hidden, BlockCall(arguments, keywords)
        return hidden if self._returned is None else self._returned


@contextmanager
def _stubs(model: PreTrainedModel, returned: Tensor | None = None) -> Iterator[list[_Stub]]:
    stubs = [_Stub(returned) for _ in decoder_blocks(model)]
    decoder = model.get_decoder()
    blocks, decoder.layers = decoder.layers, nn.ModuleList(stubs)
    try:
        yield stubs
    finally:
        decoder.layers = blocks
