"""The walk over decoder blocks: windows go through them forward, and gradients backward.

One block is open at a time. A block's inputs and outputs are put aside by window, in memory
or on disk, so that only one block's weights and sums and one window's activations are held.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunevolve.pruning.embed_and_head import (
    HEAD_TOKENS,
    BlockCall,
    block_inputs,
    final_states,
    head_logits,
    logits_in_parts,
)
from prunevolve.pruning.models import layers_of_block
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.recipe import Lesson
from prunevolve.pruning.spool import Spool
from prunevolve.pruning.statistics import (
    STATISTICS,
    Statistics,
    need_backward,
    need_forward,
    statistics_of,
    watched,
)
from prunevolve.pruning.store import Store, all_layers, in_turn

Measure = Callable[[str, Iterator[Tensor], Callable[[Tensor], Iterator[Tensor]]], None]
"""Called with a stream's name, each window's states that enter the head, (T, hidden_size), and a
function that makes logits from them."""

Visit = Callable[[str, nn.Module], object]
"""Called with a block's name and the block."""


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
        name: The stream's name; its keys in the spool begin with it.
        windows: Token ids, (N, T).
        calls: What each block is called with besides the hidden states.
        spool: Where the hidden states are put aside.
        kept: Whether every block's inputs stay there, as a backward walk needs them.
    """

    name: str
    windows: Tensor
    calls: list[BlockCall]
    spool: Spool
    kept: bool = False

    @staticmethod
    def enter(
        store: Store, name: str, texts: "Texts", spool: Spool, kept: bool = False
    ) -> "Stream | None":
        """Run a text's windows through the embeddings; None if it has none.

        The model's outside must be open.
        """
        windows = texts.by_stream(name).to(store.device)
        if not len(windows):
            return None
        calls: list[BlockCall] = []
        for i, window in enumerate(windows):
            hidden, of_window = block_inputs(store.model, window[None])
            spool[_key(name, 0, i)] = hidden[0].cpu()
            calls = calls or of_window
        return Stream(name, windows, calls, spool, kept)

    def input(self, block: int, window: int) -> Tensor:
        """Return the hidden states that enter a block, (1, T, hidden_size)."""
        return self.spool[_key(self.name, block, window)].to(self.windows.device).detach()

    @torch.no_grad()
    def look(self, block: int, module: nn.Module) -> None:
        """Run a block on all windows for its hooks' sake; the stream does not move on."""
        for i in range(len(self.windows)):
            self.calls[block].run(module, self.input(block, i))

    @torch.no_grad()
    def advance(self, block: int, module: nn.Module) -> None:
        """Run a block on all windows; its outputs enter the next one."""
        for i in range(len(self.windows)):
            output = self.calls[block].run(module, self.input(block, i))
            self.spool[_key(self.name, block + 1, i)] = output.cpu()
            if not self.kept:
                del self.spool[_key(self.name, block, i)]

    def collect(
        self, block: int, name: str, module: nn.Module, leaves: frozenset[str], moves: bool = True
    ) -> Statistics:
        """Run a block on all windows and return the statistics of its inputs.

        Args:
            name: The block's.
            moves: Whether its outputs enter the next block.
        """
        run = self.advance if moves else self.look
        with watched(layers_of_block(name, module), need_forward(leaves), module) as sums:
            run(block, module)
        return statistics_of(sums, self.windows, depth=block / max(1, len(self.calls) - 1))

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
            del self.spool[_key(self.name, block, i)]

    def end(self, store: Store, measure: Measure) -> None:
        """Measure and delete the outputs of the last block; the model's outside must be open."""

        @torch.no_grad()
        def states() -> Iterator[Tensor]:
            for i, window in enumerate(self.windows):
                hidden = self.input(len(self.calls), i)
                yield final_states(store.model, window, hidden)[0]
                del self.spool[_key(self.name, len(self.calls), i)]

        measure(self.name, states(), partial(logits_in_parts, store.model))


def collect(
    store: Store,
    windows: Tensor,
    leaves: frozenset[str],
    on_progress: Progress = unwatched,
) -> Statistics:
    """Collect statistics of the dense model; its weights are not changed.

    Args:
        windows: Token ids, (N, T); one forward pass each, and a backward pass if a leaf needs it.
        leaves: The statistics to collect; leaves that need no calibration are ignored.
    """
    collected: dict[str, Tensor] = {}
    walk_dense(
        store,
        Texts(windows),
        dict.fromkeys(store.blocks, leaves & STATISTICS),
        {},
        lambda statistics: collected.update(statistics.to_tensors()),
        None,
        on_progress,
    )
    order = [f"{leaf}/{name}" for leaf in leaves for name in all_layers(store)]
    return Statistics.from_tensors({key: collected[key] for key in order if key in collected})


def walk_dense(
    store: Store,
    texts: Texts,
    wanted: Mapping[str, frozenset[str]],
    states: Spool,
    keep: Callable[[Statistics], None],
    visit: Visit | None,
    on_progress: Progress,
) -> None:
    """Walk the dense model forward and, if a leaf needs it, backward.

    Args:
        wanted: Leaves to collect, by block.
        states: Where hidden states and gradients are put aside.
        keep: Called with a block's statistics, first of its inputs, later of its gradients.
        visit: Called with each block on the way back, when it is open for the last time; or None.
    """
    leaves = frozenset().union(*wanted.values())
    backward = bool(need_backward(leaves))
    with _frozen(store.model):
        with store.outside():
            dense = Stream.enter(store, "dense", texts, states)
            calibration = (
                Stream.enter(store, "calibration", texts, states, kept=backward) if leaves else None
            )
        if dense or calibration:
            _forward(store, dense, calibration, wanted, keep, on_progress)
        with store.outside():
            if dense:
                dense.end(store, texts.measure)
            if calibration and backward:
                enter_gradients(store, calibration)
        if calibration and backward:
            _backward(store, calibration, wanted, keep, visit, on_progress)
        elif calibration:
            calibration.drop(len(store.blocks))


def _forward(
    store: Store,
    dense: Stream | None,
    calibration: Stream | None,
    wanted: Mapping[str, frozenset[str]],
    keep: Callable[[Statistics], None],
    on_progress: Progress,
) -> None:
    on_progress("forward", 0, len(store.blocks))
    for i, (block, then) in enumerate(in_turn(store.blocks)):
        with store.open_dense(block, then) as module:
            if dense:
                dense.advance(i, module)
            if calibration:
                keep(calibration.collect(i, block, module, wanted[block]))
        on_progress("forward", i + 1, len(store.blocks))


def _backward(
    store: Store,
    calibration: Stream,
    wanted: Mapping[str, frozenset[str]],
    keep: Callable[[Statistics], None],
    visit: Visit | None,
    on_progress: Progress,
) -> None:
    total = len(store.blocks)
    on_progress("backward", 0, total)
    for done, (block, then) in enumerate(in_turn(reversed(store.blocks)), 1):
        with store.open_dense(block, then) as module:
            layers = layers_of_block(block, module)
            with watched(layers, need_backward(wanted[block]), module) as sums:
                step_back(calibration, total - done, module)
            keep(statistics_of(sums, calibration.windows))
            if visit:
                visit(block, module)
        on_progress("backward", done, total)
    calibration.drop(0)


def enter_gradients(store: Store, stream: Stream) -> None:
    """Put aside the gradient of each window's mean NLL, nats per token, at the last block's output.

    The model's outside must be open. The gradient is computed a few positions at a time, so
    that memory does not grow with vocabulary times window.
    """
    last = len(stream.calls)
    for i, window in enumerate(stream.windows):
        hidden = stream.input(last, i).requires_grad_(True)
        with torch.enable_grad():
            states = final_states(store.model, window, hidden)
        at_head = torch.zeros_like(states)
        for start in range(0, len(window) - 1, HEAD_TOKENS):
            end = min(start + HEAD_TOKENS, len(window) - 1)
            part = states[0, start:end].detach().requires_grad_(True)
            with torch.enable_grad():
                logits = head_logits(store.model, part)
                targets = window[start + 1 : end + 1]
                loss = functional.cross_entropy(logits, targets, reduction="sum")
                (loss / (len(window) - 1)).backward()
            assert part.grad is not None
            at_head[0, start:end] = part.grad
        states.backward(at_head)
        assert hidden.grad is not None
        stream.spool[_key(stream.name, last, i)] = hidden.grad.cpu()


def step_back(stream: Stream, block: int, module: nn.Module) -> None:
    """Carry every window's gradient from a block's output to its input.

    The block is run again on its kept inputs, which the gradients then replace.
    """
    for i in range(len(stream.windows)):
        hidden = stream.input(block, i).requires_grad_(True)
        gradient = stream.input(block + 1, i)
        with torch.enable_grad():
            stream.calls[block].run(module, hidden).backward(gradient)
        assert hidden.grad is not None
        stream.spool[_key(stream.name, block, i)] = hidden.grad.cpu()
        del stream.spool[_key(stream.name, block + 1, i)]


def _key(name: str, block: int, window: int) -> str:
    return f"{name}.{block}.{window}"


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While open, only watched parameters take part in a backward pass."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
