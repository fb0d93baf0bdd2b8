"""A store on disk: a folder of shards, from which one block at a time is opened.

The model is built with its parameters on the meta device. Opening a block puts memory-mapped
weights into it; closing it takes them out again. A pruned block becomes a shard of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pruning.checkpoint import Checkpoint
from pruning.models import DTYPES, decoder_blocks, outside_blocks, published_tensors, skeleton
from pruning.spool import write_tensors
from pruning.store import layer_names

_DTYPES = ("F32", "BF16", "F16")
"""What weights may be in files, in safetensors' words."""


class FolderStore:
    """A folder of shards: a block is read when it is opened, and written as a shard of its own.

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
        self.layers = layer_names(blocks)
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
        """Write the shard of all tensors outside the blocks; raises OSError if that fails."""
        self.finish()
        inside = {name for names in self._names.values() for name in names.values()}
        others = [name for name in self.checkpoint.entries if name not in inside]
        write_tensors(self.shard(None), self.checkpoint.read(others))

    def placed(self) -> dict[str, str]:
        """Return the file name of every tensor in the written shards, by published name."""
        files = {
            published: self.shard(block).name
            for block, names in self._names.items()
            for published in names.values()
        }
        outside = self.shard(None).name
        return {name: files.get(name, outside) for name in self.checkpoint.entries}

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


def _set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    module.get_submodule(owner).register_parameter(last, parameter)
