"""The headers of safetensors files: which tensors are where, before one of them is read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pruning.json_file import read_object

INDEX = "model.safetensors.index.json"

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


def read_headers(folder: Path) -> dict[str, Entry]:
    """Return where a model's tensors are, by published name.

    Raises:
        ValueError: As `weights_files` and `read_header`.
    """
    entries: dict[str, Entry] = {}
    for path in weights_files(folder):
        entries |= read_header(path)
    return entries


def weights_files(folder: Path) -> list[Path]:
    """Return a model's safetensors files, all of which exist.

    Raises:
        ValueError: If it has none (`.bin` files do not count), one is missing, or its index names
            no file beside it.
    """
    files = [folder / "model.safetensors"]
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


def read_header(path: Path) -> dict[str, Entry]:
    """Return where the tensors of a safetensors file are, by name.

    Raises:
        ValueError: If safetensors refuses the file: it is torn, or none of its format.
    """
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
