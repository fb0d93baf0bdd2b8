"""Safetensors files: a model's published ones, and tensors put aside during a walk."""

import hashlib
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prunevolve.pruning.json_file import read_object, whole_file

INDEX = "model.safetensors.index.json"

_BESIDE = (
    *("config.json", "generation_config.json", "tokenizer*", "*.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
"""Files of a model beside its weights."""

_PUBLISHED = {
    "gemma3": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
}
"""Prefixes of parameters with other names in published files, by `model_type`: ours, theirs."""


def published_names(config: PretrainedConfig, name: str) -> list[str]:
    """Return the names that a parameter may have in published files, likeliest last.

    Files of the base model alone have them without `model.`.
    """
    renames = _PUBLISHED.get(config.model_type, {}).items()
    renamed = [name.replace(ours, theirs, 1) for ours, theirs in renames if name.startswith(ours)]
    return [name.removeprefix("model."), name, *renamed]


def read_tensor(path: Path, name: str) -> Tensor:
    """Return a tensor of a safetensors file, memory-mapped: it costs no memory until it is used."""
    try:
        with safe_open(path, "pt") as file:
            return cast(Tensor, file.get_tensor(name))
    except (TypeError, ValueError, RuntimeError) as error:
        if "torch.storage.UntypedStorage" in str(error):
            raise KeyboardInterrupt from error  # swallowed while torch asks for its shape
        raise


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; a GPU fetches it while the host goes on."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor  # else the host copies first
    return pinned.to(device, non_blocking=True)


def text_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the decoder and the head, tied ones by each of their names."""
    parts = model.get_decoder(), model.get_output_embeddings()
    text = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in text}


def outside_blocks(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return those of these that are outside the decoder blocks."""
    inside = {id(parameter) for parameter in model.get_decoder().layers.parameters()}
    return {name: p for name, p in text_parameters(model).items() if id(p) not in inside}


def files_beside(folder: Path) -> list[Path]:
    """Return a model's configs and the files of its tokenizer."""
    return sorted({path for glob in _BESIDE for path in folder.glob(glob) if path.is_file()})


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: a pass without a copy."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def write_tensors(path: Path, tensors: dict[str, Tensor], sync: bool = True) -> None:
    """Write a safetensors file, whole or not at all; raises OSError if it cannot be written."""
    with whole_file(path, sync) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # by the umask; safetensors writes files for their owner alone
        try:
            save_file(tensors, draft, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.name} cannot be written: {error}") from error
        draft.chmod(mode)


Offload = MutableMapping[str, Tensor]  # tensors put aside, by key; a plain dict is memory


class DiskOffload(MutableMapping[str, Tensor]):
    """Tensors by key in a folder of this process, one file each; read back memory-mapped."""

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
        if key not in self:
            raise KeyError(key)
        return read_tensor(self._path(key), "tensor")

    def __contains__(self, key: object) -> bool:  # without opening the file
        return self._path(str(key)).exists()

    def __delitem__(self, key: str) -> None:
        self._path(key).unlink()

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*.safetensors")):
            yield path.relative_to(self.folder).as_posix().removesuffix(".safetensors")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


class Entry(NamedTuple):
    """Where one tensor is, its shape, and safetensors' name of its dtype."""

    path: Path
    shape: tuple[int, ...]
    kind: str


class Checkpoint:
    """The tensors of a folder of safetensors files, or of one file, by their published names.

    Raises ValueError if there are none (`.bin` files do not count), or one is torn or missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        for file in [path] if path.is_file() else _weights_files(path):
            try:
                with safe_open(file, "pt") as tensors:  # checks sizes, gaps and overlaps
                    for name in tensors.keys():  # noqa: SIM118  # it is no dict
                        x = tensors.get_slice(name)
                        self.entries[name] = Entry(file, tuple(x.get_shape()), x.get_dtype())
            except (SafetensorError, OSError) as error:
                problem = f"is torn or not a safetensors file ({error}): copy it again"
                raise ValueError(f"weights file {str(file)!r} {problem}") from error

    def published(self, model: PreTrainedModel) -> dict[str, str]:
        """Return the published name of each of a model's parameters that files have.

        Raises ValueError if a tensor of the text model is missing that is not tied to another, or
        one has another shape than the model's, or a dtype that cannot be pruned.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        published = {
            parameter: name
            for parameter in parameters
            for name in published_names(model.config, parameter)
            if name in self.entries
        }
        for parameter, name in published.items():
            entry, shape = self.entries[name], tuple(parameters[parameter].shape)
            if entry.shape != shape:
                raise ValueError(f"{name} must have shape {shape} by its config, got {entry.shape}")
            if entry.kind not in ("F32", "BF16", "F16"):
                raise ValueError(f"{name} must be F32, BF16 or F16, got {entry.kind}")
        has = {*published, *model.all_tied_weights_keys}
        if missing := [name for name in text_parameters(model) if name not in has]:
            raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} among them")
        return published

    def read(self, name: str) -> Tensor:
        """Return a tensor by its published name, as `read_tensor`."""
        return read_tensor(self.entries[name].path, name)

    def check_finite(self) -> None:
        """Raise ValueError, which names file and tensor, if a value is not finite."""
        for name, entry in self.entries.items():
            if not is_finite(self.read(name)):
                problem = f"tensor {name} has a value that is not finite"
                raise ValueError(f"model file {str(entry.path)!r}: {problem}")

    def fingerprint(self) -> str:
        """Return a hash of names, dtypes, shapes, and some bytes of every tensor, in 16 digits."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name} {entry.kind} {entry.shape}".encode())
            content = self.read(name).flatten().view(torch.uint8)
            middle = len(content) // 2
            digest.update(content[middle : middle + 4096].numpy().tobytes())
        return digest.hexdigest()[:16]


def _weights_files(folder: Path) -> list[Path]:
    index, names = folder / INDEX, ["model.safetensors"]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(Path(str(name)).name == name for name in names):
            raise ValueError(f"file {str(index)!r} must have a weight_map to files beside it")
    files = [folder / name for name in sorted(set(names))]
    if missing := [path for path in files if not path.is_file()]:
        way_out = "convert .bin files, which are pickles and not read, with transformers"
        lacks = f"model {str(folder)!r} lacks its weights file {missing[0].name}"
        raise ValueError(f"{lacks}: {way_out}" if any(folder.glob("*.bin")) else lacks)
    return files
