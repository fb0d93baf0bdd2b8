"""Where a model's decoder blocks live: in memory, or in a folder of shards.

The walk over blocks (`pruning.walk`) asks a store for one block at a time and hands it back pruned;
it is the same for both stores. `open` gives a block as it was written, or dense if it was not;
while `outside` is open, everything outside the blocks is real: embeddings, norms and head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prunevolve.pruning.checkpoint import INDEX, Checkpoint
from prunevolve.pruning.embed_and_head import logits_in_parts
from prunevolve.pruning.json_file import write_json
from prunevolve.pruning.models import (
    DTYPES,
    decoder_blocks,
    layers_of_block,
    linear_layers,
    outside_blocks,
    published_tensors,
    skeleton,
)
from prunevolve.pruning.spool import write_tensors

_DTYPES = ("F32", "BF16", "F16")
"""What weights may be in files, in safetensors' words."""

BATCH_TOKENS = 2048
"""Tokens that pass a model in memory at a time, at least one window: short windows leave its matrix
products too small for a GPU, or for a CPU's bf16 units."""


class ResidentStore:
    """A model in memory: its blocks are always open.

    Weights are replaced, never written to: the dense ones stay as they are for whoever has them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._blocks = decoder_blocks(model)
        self._layers = linear_layers(model)
        self.blocks = tuple(self._blocks)
        self.layers = _layer_names(self._blocks)
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

    def restore(self, dense: Mapping[str, Tensor]) -> None:
        """Restore the dense weights, bit for bit; no block then counts as written.

        The model has the given tensors themselves if they are where it is, else copies.
        """
        self._replace(dense)
        self.written.clear()

    def _replace(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            live = self._layers[name].weight
            live.data = weight.to(live, non_blocking=True)

    def states(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield each window's states that enter the head, (T, hidden_size)."""
        for batch in windows.to(self.device).split(max(1, BATCH_TOKENS // windows.shape[1])):
            yield from self.model.base_model(input_ids=batch, use_cache=False)[0]

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


class FolderStore:
    """A folder of shards: a block is read when it is opened, and written as a shard of its own.

    The model is built with its parameters on the meta device. Opening a block puts memory-mapped
    weights into it; closing it takes them out again.

    Args:
        checkpoint: The dense model's files.
        config: The model's config.
        dtype: Dtype of the passes, a key of `DTYPES`; files keep their own.
        device: Where passes run. On a GPU the next block is loaded while one is open.
        shards: Folder for the shards that are written; finished shards in it count as
            written. None if nothing will be written.
        held: Whether blocks stay in memory once they have been opened, until they are written.

    Attributes:
        on_shard: Called with each finished shard, while the walk continues.

    Raises:
        ValueError: If a tensor is missing, its shape is not the one in the config, or its dtype
            cannot be pruned.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        dtype: str,
        device: str = "cpu",
        shards: Path | None = None,
        held: bool = False,
    ) -> None:
        self.model = skeleton(config, DTYPES[dtype])
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        blocks = decoder_blocks(self.model)
        self.blocks = tuple(blocks)
        self.layers = _layer_names(blocks)
        self.config, self.checkpoint, self._shards = config, checkpoint, shards
        self._dtype, self.device = DTYPES[dtype], torch.device(device)
        self._held = set(self.blocks if held else ())
        self._published = published_tensors(str(checkpoint.place), self.model, checkpoint.entries)
        self._names = {
            name: {
                inner: self._published[f"{name}.{inner}"] for inner, _ in block.named_parameters()
            }
            for name, block in blocks.items()
        }
        self._check_dtypes()
        self._opened: set[str] = set()
        self._ahead: tuple[str, Future[dict[str, Tensor]]] | None = None
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self.on_shard: Callable[[Path], object] = lambda path: None
        self.written = {name for name in blocks if shards and self.shard(name).exists()}

    def shard(self, block: str | None) -> Path:
        """Return the file of a block's shard; for None, that of all tensors outside the blocks."""
        assert self._shards
        number = 1 if block is None else 2 + self.blocks.index(block)
        return self._shards / f"model-{number:05d}-of-{1 + len(self.blocks):05d}.safetensors"

    @contextmanager
    def outside(self) -> Iterator[PreTrainedModel]:
        """Read embeddings, norms and head, and drop them again."""
        parameters = outside_blocks(self.model)
        names = {name: self._published[name] for name in parameters if name in self._published}
        tensors = self._cast(self.checkpoint.read(names.values()))
        try:
            for name, published in names.items():
                _set_parameter(self.model, name, tensors[published])
            self.model.tie_weights()
            yield self.model
        finally:
            for name, parameter in parameters.items():
                _set_parameter(self.model, name, parameter)
            self.model.tie_weights()

    @contextmanager
    def open(self, block: str) -> Iterator[nn.Module]:
        """Open a block from its own shard if it has been written."""
        self.finish()
        written = Checkpoint(self.shard(block)) if block in self.written else None
        with self._open(block, written) as module:
            yield module

    @contextmanager
    def open_dense(self, block: str, then: str | None = None) -> Iterator[nn.Module]:
        """Open a block from the dense model's files."""
        with self._open(block, None, then) as module:
            yield module

    def dense(self, layer: str) -> Tensor:
        """Return the layer's weight in the dense model's files, memory-mapped."""
        published = self._published[f"{layer}.weight"]
        return self.checkpoint.read([published])[published]

    def weight(self, layer: str) -> Tensor:
        """Return the layer's dense weight in the dtype and on the device of the passes."""
        live: Tensor = self.model.get_parameter(f"{layer}.weight").detach()
        return self.dense(layer).to(self.device, self._dtype) if live.is_meta else live

    def write(self, block: str, weights: Mapping[str, Tensor]) -> None:
        """Write the block's shard: the new weights, and the rest as in the dense model.

        The shard is written while the walk continues, one shard at a time.

        Raises:
            OSError: If the previous shard could not be written.
        """
        self.finish()
        names, module = self._names[block], self.model.get_submodule(block)
        tensors = self.checkpoint.read(names.values())
        for layer, weight in weights.items():
            parameter = f"{layer}.weight".removeprefix(f"{block}.")
            published = names[parameter]
            tensors[published] = weight.to("cpu", tensors[published].dtype).contiguous()
            _set_parameter(module, parameter, tensors[published].to(self.device, self._dtype))
        self._opened.discard(block)
        self.written.add(block)
        self._writing = self._writer.submit(self._write_shard, self.shard(block), tensors)

    def finish(self) -> None:
        """Wait for the shard that is being written; raises OSError if that failed."""
        if self._writing:
            self._writing.result()

    def write_outside(self) -> None:
        """Write the shard of all tensors outside the blocks, and last the index of all shards.

        Raises:
            OSError: If that fails.
        """
        self.finish()
        inside = {name for names in self._names.values() for name in names.values()}
        others = [name for name in self.checkpoint.entries if name not in inside]
        write_tensors(self.shard(None), self.checkpoint.read(others))
        files = {
            published: self.shard(block).name
            for block, names in self._names.items()
            for published in names.values()
        }
        outside = self.shard(None).name
        placed = {name: files.get(name, outside) for name in self.checkpoint.entries}
        index = {"metadata": {"total_size": self.checkpoint.size}, "weight_map": placed}
        write_json(self.shard(None).parent / INDEX, index)

    def _write_shard(self, path: Path, tensors: dict[str, Tensor]) -> None:
        write_tensors(path, tensors)
        self.on_shard(path)

    @contextmanager
    def _open(
        self, block: str, written: Checkpoint | None, then: str | None = None
    ) -> Iterator[nn.Module]:
        module = self.model.get_submodule(block)
        if block not in self._opened:
            module.load_state_dict(self._load(block, written), assign=True)
        if then:
            self._read_ahead(then)
        try:
            yield module
        finally:
            if block in self._held and block not in self.written:
                self._opened.add(block)
            elif block not in self._opened:
                for name, parameter in list(module.named_parameters()):
                    _set_parameter(module, name, torch.empty_like(parameter, device="meta"))

    def _load(self, block: str, written: Checkpoint | None) -> dict[str, Tensor]:
        """Return a block's tensors by its parameter names, in dtype and device of the passes."""
        if written is None and self._ahead and self._ahead[0] == block:
            tensors = self._ahead[1].result()
            self._ahead = None
        else:
            tensors = self._read(block, written or self.checkpoint)
        return {name: tensors[published] for name, published in self._names[block].items()}

    def _read(self, block: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
        return self._cast(checkpoint.read(self._names[block].values()))

    def _read_ahead(self, block: str) -> None:
        if self.device.type == "cpu":
            self.checkpoint.read_ahead(self._names[block].values())
        elif block not in self._opened and not self._ahead:
            self._ahead = block, self._reader.submit(self._read, block, self.checkpoint)

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.device, self._dtype) for name, t in tensors.items()}

    def _check_dtypes(self) -> None:
        for names in self._names.values():
            for entry in map(self.checkpoint.entries.__getitem__, names.values()):
                if entry.kind not in _DTYPES:
                    raise ValueError(
                        f"weights of {entry.path.name} must be one of {', '.join(_DTYPES)}, got "
                        f"{entry.kind}"
                    )


Store = ResidentStore | FolderStore
"""A model whose blocks are opened one at a time.

Both have the `model`, whose parameters are real only while their block, or the outside, is open;
the names of its `blocks`, in order; those of the prunable `layers` by block; the blocks `written`,
which have been handed back pruned; and the `device` where passes run and scores are computed.
"""


def all_layers(store: Store) -> list[str]:
    """Return the names of all prunable layers, in order."""
    return [name for block in store.blocks for name in store.layers[block]]


def in_turn(names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each name with the one after it."""
    listed = list(names)
    yield from zip(listed, [*listed[1:], None], strict=True)


def _layer_names(blocks: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Return the names of the prunable layers of blocks, by block."""
    return {name: tuple(layers_of_block(name, block)) for name, block in blocks.items()}


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    module.get_submodule(owner).register_parameter(last, parameter)
