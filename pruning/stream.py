"""Windows of text on their way through the decoder blocks, and gradients on their way back.

A block's inputs and outputs are put aside by window, in memory or on disk, so that only one
window's activations are held beside a block.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunevolve.pruning.checkpoint import Offload
from prunevolve.pruning.embed_and_head import (
    HEAD_TOKENS,
    BlockCall,
    block_inputs,
    final_states,
    head_logits,
    logits_in_parts,
)
from prunevolve.pruning.models import layers_of_block
from prunevolve.pruning.reconstruct import Lesson
from prunevolve.pruning.statistics import (
    Statistics,
    need_backward,
    need_forward,
    statistics_of,
    watched,
)
from prunevolve.pruning.store import Store, moved

Measure = Callable[[str, Iterator[Tensor], Callable[[Tensor], Iterator[Tensor]]], None]
"""Called with a stream's name, each window's states that enter the head, (T, hidden_size), and a
function that makes logits from them."""


@dataclass(frozen=True)
class Texts:
    """Windows of text, (N, T) each, and what they are for.

    Attributes:
        calibration: For the statistics; ignored if none is needed.
        evaluations: Windows by stream, `dense` and `pruned`, which pass the model before and after
            pruning.
        measure: Gets the states of these streams that enter the head.
    """

    calibration: Tensor
    evaluations: Mapping[str, Tensor] = field(default_factory=dict)
    measure: Measure = lambda name, states, head: None

    def by_stream(self, name: str) -> Tensor:
        """Return the windows of a stream; zero windows if there is no such stream.

        Those of calibration pass the dense model once more as `targets`, for a training.
        """
        if name in ("calibration", "targets"):
            return self.calibration
        return self.evaluations.get(name, self.calibration[:0])


@dataclass
class Stream:
    """Windows of text on their way through the blocks.

    Attributes:
        name: The stream's name; its keys begin with it.
        windows: Token ids, (N, T).
        calls: What each block is called with besides the hidden states.
        states: Where the hidden states are put aside.
        kept: Whether every block's inputs stay there, as a backward pass needs them.
    """

    name: str
    windows: Tensor
    calls: list[BlockCall]
    states: Offload
    kept: bool = False
    _coming: tuple[str, Tensor, torch.Event] | None = None  # from the device, and when it is here

    @staticmethod
    def enter(
        store: Store, name: str, texts: Texts, states: Offload, kept: bool = False
    ) -> "Stream":
        """Run a text's windows through the embeddings; the model's outside must be open."""
        stream = Stream(name, texts.by_stream(name).to(store.device), [], states, kept)
        for i, window in enumerate(stream.windows):
            hidden, calls = block_inputs(store.model, window[None])
            stream._put(0, i, hidden[0])
            stream.calls = stream.calls or calls
        stream._settle()
        return stream

    def input(self, block: int, window: int) -> Tensor:
        """Return the hidden states that enter a block, (1, T, hidden_size)."""
        return moved(self.states[self._key(block, window)], self.windows.device).detach()

    @torch.no_grad()
    def advance(self, block: int, module: nn.Module, moves: bool = True) -> None:
        """Run a block on all windows; its outputs enter the next one, unless the windows wait."""
        for i in range(len(self.windows)):
            output = self.calls[block].run(module, self.input(block, i))
            if moves:
                self._put(block + 1, i, output)
            if moves and not self.kept:
                del self.states[self._key(block, i)]
        self._settle()

    def collect(
        self, block: int, name: str, module: nn.Module, terminals: frozenset[str], moves: bool
    ) -> Statistics:
        """Run a block on all windows and return the statistics of its inputs.

        Args:
            name: The block's.
            moves: Whether its outputs enter the next block.
        """
        with watched(layers_of_block(name, module), need_forward(terminals), module) as sums:
            self.advance(block, module, moves)
        return statistics_of(sums, self.windows, depth=block / max(1, len(self.calls) - 1))

    def collect_back(
        self, block: int, name: str, module: nn.Module, terminals: frozenset[str]
    ) -> Statistics:
        """Carry every window's gradient from a block's output to its input; return its statistics.

        The block is run again on its kept inputs, which the gradients then replace.
        """
        with watched(layers_of_block(name, module), need_backward(terminals), module) as sums:
            for i in range(len(self.windows)):
                hidden = self.input(block, i).requires_grad_(True)
                gradient = self.input(block + 1, i)
                with torch.enable_grad():
                    self.calls[block].run(module, hidden).backward(gradient)
                assert hidden.grad is not None
                self._put(block, i, hidden.grad)
                del self.states[self._key(block + 1, i)]
            self._settle()
        return statistics_of(sums, self.windows)

    def lesson(self, block: int, targets: "Stream") -> Lesson:
        """Return what a block is trained on: its inputs here, and its outputs in another stream."""
        return Lesson(
            len(self.windows),
            partial(self.input, block),
            partial(targets.input, block + 1),
            self.calls[block].run,
        )

    def drop(self, block: int) -> None:
        """Delete the hidden states at a block's input."""
        for i in range(len(self.windows)):
            del self.states[self._key(block, i)]

    def end(self, store: Store, measure: Measure) -> None:
        """Measure and delete the outputs of the last block; the model's outside must be open."""

        @torch.no_grad()
        def states() -> Iterator[Tensor]:
            for i, window in enumerate(self.windows):
                hidden = self.input(len(self.calls), i)
                yield final_states(store.model, window, hidden)[0]
                del self.states[self._key(len(self.calls), i)]

        measure(self.name, states(), partial(logits_in_parts, store.model))

    def enter_gradients(self, store: Store) -> None:
        """Put aside the gradient of each window's mean NLL, nats per token, at the last output.

        The model's outside must be open. The gradient is computed a few positions at a time, so
        that memory does not grow with vocabulary times window.
        """
        last = len(self.calls)
        for i, window in enumerate(self.windows):
            hidden = self.input(last, i).requires_grad_(True)
            with torch.enable_grad():
                states = final_states(store.model, window, hidden)
            states.backward(_gradient_at_head(store, window, states[0])[None])
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


def _gradient_at_head(store: Store, window: Tensor, states: Tensor) -> Tensor:
    """Return the gradient of a window's mean NLL by what enters the head, (T, hidden_size)."""
    at_head = torch.zeros_like(states)
    for start in range(0, len(window) - 1, HEAD_TOKENS):
        end = min(start + HEAD_TOKENS, len(window) - 1)
        part = states[start:end].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = head_logits(store.model, part)
            loss = functional.cross_entropy(logits, window[start + 1 : end + 1], reduction="sum")
            (loss / (len(window) - 1)).backward()
        assert part.grad is not None
        at_head[start:end] = part.grad
    return at_head
