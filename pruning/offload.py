"""Tensors put aside during a walk: in a dict in memory, or in a folder of safetensors files."""

import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from torch import Tensor

from prunevolve.pruning.checkpoint import read_tensor, write_tensors

Offload = MutableMapping[str, Tensor]
"""Tensors by key; a plain dict keeps them in memory."""


class DiskOffload(MutableMapping[str, Tensor]):
    """Tensors by key in a folder of this process, one file each; read back memory-mapped.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
        folder.mkdir(parents=True, exist_ok=True)

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, {"tensor": tensor.contiguous()}, sync=False)

    def __getitem__(self, key: str) -> Tensor:
        path = self._path(key)
        if not path.exists():
            raise KeyError(key)
        return read_tensor(path, "tensor")

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*.safetensors")):
            yield path.relative_to(self.folder).as_posix().removesuffix(".safetensors")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
