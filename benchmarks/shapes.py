"""Checkpoints with a published model's shape and random weights, for use without that model.

The time and memory of pruning depend on shapes and files, not on what the weights have learnt.
Names, dtype and shards are those of a published LLaMA; the tokenizer is the embedded model's, whose
ids are all below 32,000.
"""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from pruning.models import EMBEDDED, load_tokenizer

STD = 0.02
"""Standard deviation of the weights, LLaMA's initializer range."""

SHARD_BYTES = 10**9
"""Largest file of weights, since a shard is in memory, and copied, when it is written."""

_POOL = 2**24


@dataclass(frozen=True)
class Shape:
    """The sizes of an untied LLaMA without grouped-query attention."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32000
    positions: int = 2048

    def shrunk(self, layers: int, factor: int) -> "Shape":
        """Return a shape with at most `layers` blocks, and widths and heads divided by `factor`."""
        return replace(
            self,
            hidden=self.hidden // factor,
            intermediate=self.intermediate // factor,
            heads=self.heads // factor,
            layers=min(self.layers, layers),
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape by its published name, in the model's order."""
        square = (self.hidden, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden)
        }
        for i in range(self.layers):
            block = f"model.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{block}.self_attn.{name}.weight"] = square
            for name in ("gate_proj", "up_proj"):
                shapes[f"{block}.mlp.{name}.weight"] = (self.intermediate, self.hidden)
            shapes[f"{block}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{block}.{name}.weight"] = (self.hidden,)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def size(self) -> int:
        """Bytes of all tensors in bf16."""
        return sum(_bytes(shape) for shape in self.tensors().values())


LLAMA_7B = Shape(hidden=4096, intermediate=11008, layers=32, heads=32)
LLAMA_1_3B = Shape(hidden=2048, intermediate=5504, layers=24, heads=16)


def make_checkpoint(shape: Shape, folder: Path, seed: int) -> None:
    """Write a bf16 checkpoint of random weights into a new folder; the norms are 1.

    The same seed gives the same bytes. Every file of weights is synced to disk.
    """
    folder.mkdir()
    tokenizer = load_tokenizer(EMBEDDED)
    LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_shards(shape, folder, seed)


def _write_shards(shape: Shape, folder: Path, seed: int) -> None:
    shapes, source = shape.tensors(), _RandomMatrices(seed)
    weight_map: dict[str, str] = {}
    shards = list(_shards(shapes))
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: source.matrix(shapes[name]) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        with (folder / file).open("rb") as written:
            os.fsync(written.fileno())
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": shape.size}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield the names of each file's tensors, in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _bytes(shape: tuple[int, ...]) -> int:
    return torch.bfloat16.itemsize * math.prod(shape)


class _RandomMatrices:
    """Random matrices cut from one pool of normals, which is much faster than drawing new ones."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL, generator=generator).bfloat16()
        self._random = random.Random(seed)

    def matrix(self, shape: tuple[int, ...]) -> Tensor:
        """Return a bf16 matrix with a deviation of about `STD`, or ones for a norm.

        Each row is a different piece of the pool, times a scale of the row and one of the matrix,
        so no two rows are equal and no two matrices have the same statistics.
        """
        matrix = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            return matrix
        count, width = shape
        starts = self._random.sample(range(_POOL - width), count)
        level = STD * self._random.uniform(0.75, 1.25)
        scales = [level * self._random.uniform(0.75, 1.25) for _ in range(count)]
        for row, start, scale in zip(matrix, starts, scales, strict=True):
            torch.mul(self._pool[start : start + width], scale, out=row)
        return matrix
