"""Where a model's decoder blocks live during a walk: in memory, or in a folder of shards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prunevolve.pruning.checkpoint import INDEX, Checkpoint, moved, outside_blocks, write_tensors
from prunevolve.pruning.json_file import read_object, write_json
from prunevolve.pruning.masks import Stays
from prunevolve.pruning.models import DTYPES, layers_by_block, one_line_errors, skeleton, skip
from prunevolve.pruning.stream import logits_in_parts

# Tokens that pass a model in memory at a time, at least one window: few are slow on a GPU.
BATCH_TOKENS = 2048


class ResidentStore:
    """A model in memory: its blocks are always open, and its weights replaced, never written to.

    One that `narrows` takes whole rows and columns that go out of its layers, for good.
    """

    def __init__(self, model: PreTrainedModel, narrows: bool = False) -> None:
        self.model, self._narrows = model, narrows
        self.layers = layers_by_block(model)
        self.blocks = tuple(self.layers)
        self.written: set[str] = set()
        self._biases: dict[str, Tensor] = {}  # of layers that became narrower, as they were
        self._updated: dict[str, Tensor] = {}  # weights from before a `mix`
        self._stays: dict[str, tuple[int, Tensor]] = {}  # of layers that became narrower
        self.device = torch.device(model.device)  # a walk over the parameters, so only once

    def outside(self) -> AbstractContextManager[PreTrainedModel]:
        """Return the model: nothing has to be opened."""
        return nullcontext(self.model)

    def open(self, block: str, then: str | None = None) -> AbstractContextManager[nn.Module]:
        """Return the live block."""
        return nullcontext(self.model.get_submodule(block))

    def dense(self, layer: str) -> Tensor:
        """Return the live weight, dense until its block is written."""
        weight: Tensor = self.model.get_parameter(f"{layer}.weight")
        return weight.detach()

    open_dense, weight = open, dense

    def write(self, block: str, weights: Mapping[str, Tensor], stays: Stays) -> None:
        """Make the new weights those of the live block."""
        self._replace(weights)
        stays = stays if self._narrows else {}
        self._stays |= stays
        for layer, (side, kept) in stays.items():
            module = self.model.get_submodule(layer)
            assert isinstance(module, nn.Linear)
            self._replace({layer: narrowed(module.weight.data, side, kept)})
            if module.bias is not None and side == 0:
                self._biases[layer] = module.bias.data
                module.bias.data = narrowed(module.bias.data, side, kept)
        self.written.add(block)

    def finish(self) -> None:
        """Do nothing: blocks are written at once."""

    def mix(self, dense: Mapping[str, Tensor]) -> None:
        """Make the given dense weights the model's; those that it has now stay as the `updated`."""
        self._updated = {layer: self.dense(layer) for layer in dense}
        self.restore(dense)

    def updated(self, block: str) -> tuple[dict[str, Tensor], Stays]:
        """Return a block's weights from before the `mix`, in the dense ones' shape, and what stays
        of layers that became narrower.
        """
        layers = self.layers[block]
        stays = {layer: self._stays[layer] for layer in layers if layer in self._stays}
        return _widened({x: self._updated[x] for x in layers}, self.dense, stays), stays

    def restore(self, dense: Mapping[str, Tensor]) -> None:
        """Make the given dense weights, or copies on its device, the model's: none is written."""
        self._replace(dense)
        for layer, bias in self._biases.items():
            self.model.get_parameter(f"{layer}.bias").data = bias
        self.written.clear()

    def _replace(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight.data = weight.to(layer.weight, non_blocking=True)
            layer.out_features, layer.in_features = weight.shape

    def states(self, windows: Tensor) -> Iterator[Tensor]:
        """Yield each window's states that enter the head, (T, hidden_size)."""
        for batch in windows.to(self.device).split(max(1, BATCH_TOKENS // windows.shape[1])):
            yield from self.model.base_model(input_ids=batch, use_cache=False)[0]

    def logits(self, states: Tensor) -> Iterator[Tensor]:
        """Yield the logits of states, (T, hidden_size), as `logits_in_parts`."""
        return logits_in_parts(self.model, states)


class FolderStore:
    """A folder of shards: a block is read when it is opened, and written as a shard of its own.

    Dtype, a key of `DTYPES`, and device are those of the passes; files keep their own dtype. Shards
    that are finished count as written. A store that `keeps` blocks holds them in memory from their
    first opening until they are written; layers that are `skipped` are none of its own. Raises
    ValueError as `Checkpoint.published`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        dtype: str,
        device: str,
        shards: Path,
        keeps: bool = False,
        skipped: str | None = None,
    ) -> None:
        self.checkpoint, self._shards, self._keeps = checkpoint, shards, keeps
        self.device, self._dtype = torch.device(device), DTYPES[dtype]
        self.model = skeleton(config, self._dtype)
        skip(self.model, skipped)
        buffers = self.model.named_buffers(remove_duplicate=False)
        self._put({name: buffer.to(self.device) for name, buffer in buffers})
        self.layers = layers_by_block(self.model)
        self.blocks = tuple(self.layers)
        with one_line_errors(str(checkpoint.path)):
            self._published = checkpoint.published(self.model)
        # Parameters on the meta device by qualified name: of each block, and of the outside.
        self._meta = {
            block: dict(self.model.get_submodule(block).named_parameters(prefix=block))
            for block in self.blocks
        }
        self._meta_outside = outside_blocks(self.model)
        self._threads = ThreadPoolExecutor(2)  # one reads ahead, one writes
        self._ahead: dict[str, Future[dict[str, nn.Parameter]]] = {}
        self._writing: Future[None] | None = None
        self._before = shards.with_name(f"{shards.name}.before")  # where a `mix` puts them
        self.on_shard: Callable[[Path], object] = lambda path: None  # called with finished ones
        self.written = {block for block in self.blocks if self.shard(block).exists()}

    def shard(self, block: str | None) -> Path:
        """Return the file of a block's shard; for None, that of all tensors outside the blocks."""
        number = 1 if block is None else 2 + self.blocks.index(block)
        return self._shards / f"model-{number:05d}-of-{1 + len(self.blocks):05d}.safetensors"

    @contextmanager
    def outside(self) -> Iterator[PreTrainedModel]:
        """Read embeddings, norms and head, and drop them again."""
        try:
            self._put(self._read(self._meta_outside, self.checkpoint))
            self.model.tie_weights()
            yield self.model
        finally:
            self._put(self._meta_outside)

    def open(self, block: str) -> AbstractContextManager[nn.Module]:
        """Open a block from its own shard if it has been written."""
        self.finish()
        files = Checkpoint(self.shard(block)) if block in self.written else self.checkpoint
        return self._open(block, files)

    def open_dense(self, block: str, then: str | None = None) -> AbstractContextManager[nn.Module]:
        """Open a block from the dense model's files; on a GPU, load the next one meanwhile."""
        return self._open(block, self.checkpoint, then)

    @contextmanager
    def _open(self, block: str, files: Checkpoint, then: str | None = None) -> Iterator[nn.Module]:
        if self._is_closed(block):
            ahead = self._ahead.pop(block, None) if files is self.checkpoint else None
            self._put(ahead.result() if ahead else self._read(self._meta[block], files))
        if self.device.type != "cpu" and then and self._is_closed(then) and not self._ahead:
            names = self._meta[then]
            self._ahead[then] = self._threads.submit(self._read, names, self.checkpoint)
        try:
            yield self.model.get_submodule(block)
        finally:
            if not self._keeps or block in self.written:
                self._put(self._meta[block])

    def _is_closed(self, block: str) -> bool:
        return any(p.is_meta for p in self.model.get_submodule(block).parameters())

    def _read(self, names: Iterable[str], files: Checkpoint) -> dict[str, nn.Parameter]:
        """Return the parameters that files have, as passes use them, by qualified name."""
        published = {name: self._published[name] for name in names if name in self._published}
        return {name: self._used(files.read(tensor)) for name, tensor in published.items()}

    def _used(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(moved(tensor.to(self._dtype), self.device), requires_grad=False)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Put parameters and buffers in their places, by qualified name."""
        for name, value in values.items():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, value)

    def dense(self, layer: str) -> Tensor:
        """Return the layer's weight in the dense model's files, memory-mapped."""
        return self.checkpoint.read(self._published[f"{layer}.weight"])

    def weight(self, layer: str) -> Tensor:
        """Return the layer's dense weight in the dtype and on the device of the passes."""
        live: Tensor = self.model.get_parameter(f"{layer}.weight").detach()
        return self.dense(layer).to(self.device, self._dtype) if live.is_meta else live

    def write(self, block: str, weights: Mapping[str, Tensor], stays: Stays) -> None:
        """Write the block's shard, while the walk continues: new weights, and the rest as it was,
        without the rows and columns of layers that do not stay.

        Raises OSError if the shard before it could not be written.
        """
        self.finish()
        published = [self._published[name] for name in self._meta[block]]
        tensors = {tensor: self.checkpoint.read(tensor) for tensor in published}
        for layer, weight in weights.items():
            name = self._published[f"{layer}.weight"]
            tensors[name] = weight.to("cpu", tensors[name].dtype).contiguous()
        changed = {f"{layer}.weight" for layer in weights}
        for layer, (side, kept) in stays.items():
            for parameter in (f"{layer}.weight", f"{layer}.bias")[: 2 - side]:
                if name := self._published.get(parameter, ""):
                    tensors[name] = narrowed(tensors[name], side, kept)
                    changed.add(parameter)
        if stays:  # a shard does not tell, if it is read again
            self._stays_file(block).parent.mkdir(exist_ok=True)
            write_json(self._stays_file(block), {x: (y, z.tolist()) for x, (y, z) in stays.items()})
        self._put({name: self._used(tensors[self._published[name]]) for name in changed})
        self.written.add(block)
        path = self.shard(block)

        def write_shard() -> None:
            write_tensors(path, tensors)
            (self._before / path.name).unlink(missing_ok=True)  # so both take one model's room
            self.on_shard(path)

        self._writing = self._threads.submit(write_shard)

    def _stays_file(self, block: str) -> Path:
        name = self.shard(block).with_suffix(".json").name
        return self._shards.with_name(f"{self._shards.name}.stays") / name

    def finish(self) -> None:
        """Wait for the shard that is being written; raises OSError if that failed."""
        if self._writing:
            self._writing.result()

    def mix(self, dense: Mapping[str, Tensor]) -> None:
        """Put all shards aside, of which blocks are written anew; go on with it if it was begun."""
        if not self._before.exists():
            self._shards.rename(self._before)
            self._shards.mkdir()
        self.written = {block for block in self.blocks if self.shard(block).exists()}

    def updated(self, block: str) -> tuple[dict[str, Tensor], Stays]:
        """Return a block's weights as they were written, before a `mix` if there was one, in the
        dense ones' shape, and what stays of layers that became narrower.
        """
        self.finish()
        path, file = self.shard(block), self._stays_file(block)
        aside = self._before / path.name
        read = Checkpoint(aside if aside.exists() else path).read
        weights = {x: read(self._published[f"{x}.weight"]) for x in self.layers[block]}
        rows = read_object(file) if file.exists() else {}
        stays = {layer: (side, torch.tensor(kept)) for layer, (side, kept) in rows.items()}
        return _widened(weights, self.dense, stays), stays

    def write_outside(self) -> None:
        """Write the shard of all tensors outside the blocks, and last the index of all shards."""
        self.finish()
        outside = self.shard(None)
        inside = {
            self._published[name]: self.shard(block).name
            for block, names in self._meta.items()
            for name in names
        }
        read, entries = self.checkpoint.read, self.checkpoint.entries
        write_tensors(outside, {name: read(name) for name in entries if name not in inside})
        shards = [Checkpoint(path) for path in (outside, *map(self.shard, self.blocks))]
        sizes = (shard.read(name).nbytes for shard in shards for name in shard.entries)
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: inside.get(name, outside.name) for name in entries},
        }
        write_json(outside.with_name(INDEX), index)


def narrowed(tensor: Tensor, side: int, kept: Tensor) -> Tensor:
    """Return the rows, side 0, or columns, side 1, of a tensor that are kept."""
    return tensor.index_select(side, kept.to(tensor.device)).contiguous()


def _widened(
    weights: dict[str, Tensor], dense: Callable[[str], Tensor], stays: Stays
) -> dict[str, Tensor]:
    """Return weights of layers with 0 in the rows or columns that `narrowed` took out."""
    wide = {
        layer: weights[layer]
        .new_zeros(dense(layer).shape)
        .index_copy_(side, kept.to(weights[layer].device), weights[layer])
        for layer, (side, kept) in stays.items()
    }
    return weights | wide


Store = ResidentStore | FolderStore
"""A model whose blocks are opened one at a time.

`open` gives a block as it was written, or dense if it was not; `outside` opens embeddings, norms
and head. Both have the `model`, whose parameters are real only while they are open; the names of
its `blocks`, in order; the prunable `layers` by block and name; and the blocks `written`.
"""
