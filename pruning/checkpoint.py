"""A model's published files: safetensors shards, read tensor by tensor and memory-mapped."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunevolve.pruning.json_file import read_object
from prunevolve.pruning.spool import read_tensor

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"

_SAMPLED_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: file, first byte and length in it, shape, and safetensors' dtype."""

    path: Path
    start: int
    length: int
    shape: tuple[int, ...]
    kind: str


class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file, by their published names.

    Raises:
        ValueError: If the folder has no safetensors files (`.bin` files do not count), or one
            is torn or missing.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.entries: dict[str, Entry] = {}
        for path in [place] if place.is_file() else _weights_files(place):
            self.entries |= _read_header(path)

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.length for entry in self.entries.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by published name, memory-mapped: they cost no memory until used."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].path, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with safe_open(path, "pt") as file:
                tensors |= {name: read_tensor(file, name) for name in inside}
        return tensors

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors into its cache while other work continues."""
        if not hasattr(os, "posix_fadvise"):
            return
        for entry in (self.entries[name] for name in names):
            with entry.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), entry.start, entry.length, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """Return a hash of names, dtypes, shapes, and some bytes of every tensor, in 16 digits.

        To hash all bytes of a large model would take as long as to prune it by magnitude.
        """
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.kind} {entry.shape}".encode())
            with entry.path.open("rb") as file:
                file.seek(entry.start + entry.length // 2)
                digest.update(file.read(min(_SAMPLED_BYTES, entry.length - entry.length // 2)))
        return digest.hexdigest()[:16]


def _weights_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files, all of which exist."""
    files = [folder / WHOLE]
    index = folder / INDEX
    if index.is_file():
        named = read_object(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else []
        if not names or not all(Path(str(name)).name == name for name in names):
            raise ValueError(
                f"file {str(index)!r} must have a weight_map to safetensors files beside it"
            )
        files = [folder / name for name in sorted(set(names))]
    if missing := [path for path in files if not path.is_file()]:
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"model {str(folder)!r} has .bin weights alone, which are pickles and are not "
                "read: convert it with transformers, save_pretrained(FOLDER)"
            )
        raise ValueError(f"model {str(folder)!r} lacks its weights file {missing[0].name}")
    return files


def _read_header(path: Path) -> dict[str, Entry]:
    """Return where the tensors of a safetensors file are, by name."""
    try:
        with safe_open(path, "pt"):  # checks sizes, gaps and overlaps
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights file {str(path)!r} is torn or not a safetensors file ({error}): copy it again"
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        entries[name] = Entry(
            path=path,
            start=8 + length + begin,
            length=end - begin,
            shape=tuple(about["shape"]),
            kind=about["dtype"],
        )
    return entries
