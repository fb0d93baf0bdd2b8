"""Tensors put aside during a walk: in memory, or in a folder of safetensors files."""

import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunevolve.pruning.json_file import whole_file

Spool = MutableMapping[str, Tensor]
"""Tensors by key; a plain dict keeps them in memory."""


class DiskSpool(MutableMapping[str, Tensor]):
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
        with safe_open(path, "pt") as file:
            return read_tensor(file, "tensor")

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*.safetensors")):
            yield path.relative_to(self.folder).as_posix().removesuffix(".safetensors")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)).exists()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def read_tensor(file: safe_open, name: str) -> Tensor:
    """Return a tensor of an open safetensors file, memory-mapped.

    Raises:
        KeyboardInterrupt: Also where torch, asked for the storage's shape, has swallowed one.
    """
    try:
        tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, RuntimeError) as error:
        if "torch.storage.UntypedStorage" in str(error):
            raise KeyboardInterrupt from error
        raise
    return tensor


def write_tensors(path: Path, tensors: dict[str, Tensor], sync: bool = True) -> None:
    """Write a safetensors file, whole or not at all; see `whole_file`.

    Raises:
        OSError: If it cannot be written.
    """
    with whole_file(path, sync) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # by the umask; safetensors writes files for their owner alone
        try:
            save_file(tensors, draft, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.name} cannot be written: {error}") from error
        draft.chmod(mode)
