"""A model's published files: safetensors shards, read tensor by tensor and memory-mapped."""

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from pruning.headers import Entry, read_header, read_headers
from pruning.models import one_line_errors, published_names, source_of

_SAMPLED_BYTES = 4096


class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file, by their published names.

    Raises:
        ValueError: If the folder has no safetensors files (`.bin` files do not count), or one
            is torn or missing.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.entries: dict[str, Entry] = (
            read_header(place) if place.is_file() else read_headers(place)
        )

    @cached_property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.length for entry in self.entries.values())

    def find(self, config: PretrainedConfig, parameter: str) -> str | None:
        """Return the published name of a parameter; None if no file has it."""
        candidates = published_names(config, parameter)
        return next((name for name in candidates if name in self.entries), None)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by published name, memory-mapped: they cost no memory until used."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].path, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in inside}
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


def open_checkpoint(model: str) -> Checkpoint:
    """Open the files of a model, as `load_config` takes it; those from the hub are downloaded.

    Raises:
        ValueError: As `Checkpoint`, or the hub cannot be reached.
    """
    source, revision = source_of(model)
    if Path(source).is_dir():
        return Checkpoint(Path(source))
    with one_line_errors(model):
        # Never the pickled `.bin` files beside them, nor weights of another format in a subfolder.
        kept = ["*.json", "*.safetensors"]
        return Checkpoint(Path(snapshot_download(source, revision=revision, allow_patterns=kept)))
