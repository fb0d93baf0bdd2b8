"""Where a model's decoder blocks live: what a store is, and the store of a model in memory.

The walk over blocks (`pruning.walk`) asks a store for one block at a time and hands it back pruned;
it is the same for every store. The other store is a folder of shards (`pruning.folder_store`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.embed_and_head import logits_in_parts
from pruning.models import decoder_blocks, layers_of_block, linear_layers


class Store(Protocol):
    """A model whose blocks are opened one at a time.

    Attributes:
        model: The model; a parameter is real only while its block, or the outside, is open.
        blocks: Names of the decoder blocks, in order.
        layers: Names of the prunable layers, by block.
        written: Blocks that have been handed back pruned.
    """

    model: PreTrainedModel
    blocks: tuple[str, ...]
    layers: dict[str, tuple[str, ...]]
    written: set[str]

    @property
    def device(self) -> torch.device:
        """Where passes run and scores are computed."""

    @contextmanager
    def outside(self) -> Iterator[PreTrainedModel]:
        """While open, everything outside the blocks is real: embeddings, norms and head."""

    @contextmanager
    def open(self, block: str) -> Iterator[nn.Module]:
        """Open a block as it was written, or dense if it was not."""

    @contextmanager
    def open_dense(self, block: str, then: str | None = None) -> Iterator[nn.Module]:
        """Open a block with its dense weights; `then` names the next block."""

    def dense(self, layer: str) -> Tensor:
        """Return a layer's dense weight in its own dtype; it must not be written to."""

    def weight(self, layer: str) -> Tensor:
        """Return a layer's dense weight as the passes use it; its block is not written yet."""

    def write(self, block: str, weights: Mapping[str, Tensor]) -> None:
        """Take an open block's new weights, by layer name; the block has them from now on."""

    def finish(self) -> None:
        """Wait until all blocks that were handed back are written."""


class ResidentStore:
    """A model in memory: its blocks are always open.

    Weights are replaced, never written to: the dense ones stay as they are for whoever has them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._blocks = decoder_blocks(model)
        self._layers = linear_layers(model)
        self.blocks = tuple(self._blocks)
        self.layers = layer_names(self._blocks)
        self.written: set[str] = set()
        # Asked of the model, it is a walk over its parameters, once for every leaf of every layer.
        self.device = torch.device(model.device)

    @contextmanager
    def outside(self) -> Iterator[PreTrainedModel]:
        """Return the model: nothing has to be opened."""
        yield self.model

    @contextmanager
    def open(self, block: str, then: str | None = None) -> Iterator[nn.Module]:
        """Hand out the live block."""
        yield self._blocks[block]

    open_dense = open

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the prunable layers' weights in host memory, by layer name.

        Those of a model on a GPU are pinned, so that reads are fast.
        """
        copies = {}
        for name, layer in self._layers.items():
            copy = layer.weight.detach().to("cpu", copy=True)
            copies[name] = copy.pin_memory() if self.device.type == "cuda" else copy
        return copies

    def restore(self, dense: Mapping[str, Tensor]) -> None:
        """Restore the dense weights, bit for bit; no block then counts as written.

        The model has the given tensors themselves if they are where it is, else copies.
        """
        self._replace(dense)
        self.written.clear()

    def _replace(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            live = self._layers[name].weight
            live.data = weight.to(live)

    def states(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield each window's states that enter the head, (T, hidden_size)."""
        for window in windows.to(self.device):
            yield self.model.base_model(input_ids=window[None], use_cache=False)[0][0]

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield the logits of states, (T, hidden_size); see `logits_in_parts`."""
        return logits_in_parts(self.model, states)

    def dense(self, layer: str) -> Tensor:
        """Return the live weight, dense until its block is written."""
        return self._layers[layer].weight.detach()

    weight = dense

    def write(self, block: str, weights: Mapping[str, Tensor]) -> None:
        """Make the new weights those of the live block."""
        self._replace(weights)
        self.written.add(block)

    def finish(self) -> None:
        """Do nothing: blocks are written at once."""


def all_layers(store: Store) -> list[str]:
    """Return the names of all prunable layers, in order."""
    return [name for block in store.blocks for name in store.layers[block]]


def in_turn(names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each name with the one after it."""
    listed = list(names)
    yield from zip(listed, [*listed[1:], None], strict=True)


def layer_names(blocks: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Return the names of the prunable layers of blocks, by block."""
    return {name: tuple(layers_of_block(name, block)) for name, block in blocks.items()}
