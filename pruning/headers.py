"""The headers of safetensors files: which tensors are where, before one of them is read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from plain_files import open_plain, parse_object, read_object

INDEX = "model.safetensors.index.json"

LONGEST = 10_000_000
"""Most bytes in a header or an index: about as many as a hundred thousand tensors need."""

_FILE = re.compile(r"[^/\\]+\.safetensors")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: file, first byte and length in it, shape, and safetensors' dtype."""

    path: Path
    start: int
    length: int
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a weight; raises ValueError if it cannot be pruned."""
        if self.kind not in _DTYPES:
            raise ValueError(
                f"weights of {self.path.name} must be one of {', '.join(_DTYPES)}, got {self.kind}"
            )
        return _DTYPES[self.kind]


def weights_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files, all of which exist.

    Raises:
        ValueError: If it has none (`.bin` files do not count), one is missing, or its index is
            malformed or names a file elsewhere.
    """
    files = named_files(folder)
    if missing := [path for path in files if not path.is_file()]:
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"model {str(folder)!r} has .bin weights alone, which are pickles and are not "
                "read: convert it with transformers, save_pretrained(FOLDER)"
            )
        raise ValueError(f"model {str(folder)!r} lacks its weights file {missing[0].name}")
    return files


def named_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a model's folder should have.

    Raises:
        ValueError: If its index is malformed or names a file elsewhere.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    named = read_object(index, LONGEST).get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    if not names or not all(isinstance(name, str) and _FILE.fullmatch(name) for name in names):
        raise ValueError(
            f"file {str(index)!r} must have a weight_map to safetensors files beside it"
        )
    return [folder / name for name in sorted(set(names))]


def read_header(path: Path) -> dict[str, Entry]:
    """Return where the tensors of a safetensors file are, by name.

    Raises:
        ValueError: If it is not a regular file, not a safetensors file, or torn.
    """
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST:
            raise ValueError(
                f"weights file {str(path)!r} is not a safetensors file: its header must have at "
                f"most {LONGEST} bytes, got {length}"
            )
        text = file.read(length)
    try:
        header = parse_object(text.decode("utf-8"), "its header")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, about) for name, about in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights file {str(path)!r} is not a safetensors file: {error}"
        ) from error
    end = max((entry.start + entry.length for entry in entries.values()), default=0)
    if end != path.stat().st_size:
        raise ValueError(
            f"weights file {str(path)!r} must have {end} bytes, got {path.stat().st_size}: it is "
            "torn; copy it again"
        )
    _ask_the_library(path)
    return entries


def _entry(path: Path, offset: int, about: dict[str, Any]) -> Entry:
    begin, end = about["data_offsets"]
    return Entry(path, offset + begin, end - begin, tuple(about["shape"]), about["dtype"])


def _ask_the_library(path: Path) -> None:
    """Let safetensors check the file: gaps, overlaps, sizes that do not fit the shapes."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"weights file {str(path)!r} is not a safetensors file: {error}"
        ) from error
