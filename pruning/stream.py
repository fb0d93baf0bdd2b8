"""Windows of text on their way through a model: embeddings, decoder blocks, head; gradients back.

A block's inputs and outputs are put aside by window, in memory or on disk, so that only one
window's activations are held beside a block.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from prunevolve.pruning.checkpoint import Offload, moved
from prunevolve.pruning.passes import Way
from prunevolve.pruning.reconstruct import Block, Examples
from prunevolve.pruning.statistics import Layers, statistics_of, watched

# Positions whose logits exist at one time: over a large vocabulary, a whole window's dwarf all.
HEAD_TOKENS = 256


class BlockCall(nn.Module):
    """Takes a decoder block's place: returns its input, or a given tensor, and records its call."""

    def __init__(self, returned: Tensor | None = None) -> None:
        super().__init__()
        self._returned = returned

    def forward(self, hidden: Tensor, *arguments: object, **keywords: object) -> Tensor:
        self.hidden, self._arguments, self._keywords = hidden, arguments, keywords
        return hidden if self._returned is None else self._returned

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """Call a block in the same way; return its output states, (batch, tokens, hidden_size)."""
        output = block(hidden, *self._arguments, **self._keywords)
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class Stream:
    """Windows of text on their way through the blocks."""

    name: str  # its keys begin with it
    windows: Tensor  # token ids, (N, T), without padding
    states: Offload  # where the hidden states are put aside
    kept: bool = False  # whether every block's inputs stay there, as a backward pass needs them
    calls: list[BlockCall] = field(default_factory=list)  # in place of each block
    _coming: tuple[str, Tensor, torch.Event] | None = None  # from the device, and when it is here

    @torch.no_grad()
    def embed(self, model: PreTrainedModel) -> None:
        """Run the windows through the embeddings; the model's outside must be open."""
        with _calls(model) as self.calls:  # which the windows' length alone decides
            for i, window in enumerate(self.windows):
                model.base_model(input_ids=window[None], use_cache=False)
                self._put(0, i, self.calls[0].hidden)
        self._settle()

    def input(self, block: int, window: int) -> Tensor:
        """Return the hidden states that enter a block, (1, T, hidden_size)."""
        return moved(self.states[self._key(block, window)], self.windows.device).detach()

    @torch.no_grad()
    def take(
        self, way: Way, block: int, module: Block, layers: Layers, terminals: Set[str]
    ) -> dict[str, Tensor]:
        """Carry all windows through a block; return the statistics of its layers on the way.

        Forward, its outputs enter the next block, unless the windows wait. Backward, it is run
        again on its kept inputs, which the gradients then replace.
        """
        call = self.calls[block]
        with watched(layers, terminals) as sums:
            for i in range(len(self.windows)):
                hidden = self.input(block, i)
                if way == "backward":
                    gradient = self.input(block + 1, i)
                    with torch.enable_grad():
                        call.run(module, hidden.requires_grad_(True)).backward(gradient)
                    assert hidden.grad is not None
                    self._put(block, i, hidden.grad)
                    del self.states[self._key(block + 1, i)]
                    continue
                output = call.run(module, hidden)
                if way != "wait":
                    self._put(block + 1, i, output)
                    if not self.kept:
                        del self.states[self._key(block, i)]
            self._settle()
        return statistics_of(sums, self.windows)

    def examples(self, block: int, targets: "Stream") -> Examples:
        """Return what a block is trained on: its inputs here, and its outputs in another stream."""
        inputs, outputs = partial(self.input, block), partial(targets.input, block + 1)
        return Examples(len(self.windows), inputs, outputs, self.calls[block].run)

    def drop(self, block: int) -> None:
        """Delete the hidden states at a block's input."""
        for i in range(len(self.windows)):
            del self.states[self._key(block, i)]

    @torch.no_grad()
    def leave(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Yield each window's states that enter the head; the model's outside must be open."""
        for i, window in enumerate(self.windows):
            hidden = self.input(len(self.calls), i)
            yield _states_at_head(model, window, hidden)[0]
            del self.states[self._key(len(self.calls), i)]

    def differentiate(self, model: PreTrainedModel) -> None:
        """Put aside the gradient of each window's mean NLL, nats per token, at the last output.

        The model's outside must be open.
        """
        last = len(self.calls)
        for i, window in enumerate(self.windows):
            hidden = self.input(last, i).requires_grad_(True)
            with torch.enable_grad():
                states = _states_at_head(model, window, hidden)
            states.backward(gradient_at_head(model, window, states[0])[None])
            assert hidden.grad is not None
            self._put(last, i, hidden.grad)
        self._settle()

    def _put(self, block: int, window: int, tensor: Tensor) -> None:
        """Put a window's tensor aside; one on a device comes while the device goes on."""
        key = self._key(block, window)
        if tensor.device.type == "cpu":
            self.states[key] = tensor
            return
        copy = tensor.to("cpu", non_blocking=True)  # into pinned memory, beside the device's work
        here = torch.get_device_module(tensor.device).Event()
        here.record()
        self._settle()
        self._coming = key, copy, here

    def _settle(self) -> None:
        """Wait for what is still coming, and put it aside."""
        if self._coming:
            key, copy, here = self._coming
            here.synchronize()
            self.states[key] = copy.clone()  # little of the memory may be pinned
            self._coming = None

    def _key(self, block: int, window: int) -> str:
        return f"{self.name}.{block}.{window}"


def logits_in_parts(model: PreTrainedModel, states: Tensor) -> Iterator[Tensor]:
    """Yield the logits of states that enter the head, (T, hidden_size), in fp32, some tokens' at a
    time, (tokens, vocabulary).
    """
    head = model.get_output_embeddings()
    tokens = 32 if states.device.type == "cpu" else HEAD_TOKENS  # what stays in the cache
    for chunk in states.split(HEAD_TOKENS):
        for part in head(chunk).split(tokens):
            yield _capped(model, part)


def _capped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    # As in the model's own forward: Gemma3ForConditionalGeneration ignores its text part's cap.
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


def gradient_at_head(model: PreTrainedModel, window: Tensor, states: Tensor) -> Tensor:
    """Return the gradient of a window's mean NLL by what enters the head, (T, hidden_size)."""
    at_head = torch.zeros_like(states)
    for start in range(0, len(window) - 1, HEAD_TOKENS):
        end = min(start + HEAD_TOKENS, len(window) - 1)
        part = states[start:end].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = _capped(model, model.get_output_embeddings()(part))
            loss = functional.cross_entropy(logits, window[start + 1 : end + 1], reduction="sum")
            (loss / (len(window) - 1)).backward()
        assert part.grad is not None
        at_head[start:end] = part.grad
    return at_head


def _states_at_head(model: PreTrainedModel, window: Tensor, hidden: Tensor) -> Tensor:
    """Return what enters the head from what the last block returned, both (1, T, hidden_size).

    Of the window's token ids, (T,), only the number matters.
    """
    with _calls(model, hidden):
        states: Tensor = model.base_model(input_ids=window[None], use_cache=False)[0]
    return states


@contextmanager
def _calls(model: PreTrainedModel, returned: Tensor | None = None) -> Iterator[list[BlockCall]]:
    decoder = model.get_decoder()
    blocks, calls = decoder.layers, [BlockCall(returned) for _ in decoder.layers]
    decoder.layers = nn.ModuleList(calls)
    try:
        yield calls
    finally:
        decoder.layers = blocks
