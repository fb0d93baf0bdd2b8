"""`--statistics`: a folder of statistics that are used again, or the release's gradients."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plain_files import check_plain, open_plain
from pruning.metric_file import read_json
from pruning.result.work import FolderMismatchError, made, write_json
from pruning.spool import DiskSpool, Spool
from pruning.store import Store

SETTINGS = "statistics.json"

_DEPENDS_ON = ("model", "calibration", "dtype")
"""What statistics depend on, of all that a result does."""


@contextmanager
def opened_statistics(
    path: Path | None, identity: Mapping[str, Any], store: Store
) -> Iterator[Spool | None]:
    """Open the statistics that are kept at a path, by `G/layer`; new ones are kept there too.

    Args:
        path: A folder, made if it is not there, and taken away again if nothing came into it; or a
            `.pth` file, the gradients that the release of Pruner-Zero or GBLM saved, to which
            nothing is added. None if nothing is kept.
        identity: What the result depends on; model, calibration and dtype are looked at.

    Raises:
        FolderMismatchError: If the folder's statistics are of another model, text or dtype.
        ValueError: If the file is no dictionary of the model's gradients, the folder cannot be
            made, or what is in it is no regular file.
    """
    if path is None:
        yield None
    elif path.suffix == ".pth":
        yield _Gradients(path, store)
    else:
        check_plain(path, "**/*")
        settings = {key: identity[key] for key in _DEPENDS_ON}
        if path.is_dir() and any(path.iterdir()):
            _check_settings(path, settings)
            yield DiskSpool(path)
        else:
            with _new_folder(path, settings):
                yield DiskSpool(path)


@contextmanager
def _new_folder(path: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(made(path))
            write_json(path / SETTINGS, settings)
        except OSError as error:
            raise ValueError(f"statistics {str(path)!r} cannot be made: {error}") from error
        try:
            yield
        finally:
            if len(list(path.iterdir())) == 1:  # the settings alone
                (path / SETTINGS).unlink()


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    if not (path / SETTINGS).is_file():
        raise FolderMismatchError(
            f"statistics {str(path)!r} has no {SETTINGS} and is not empty: name another folder"
        )
    before = read_json(path / SETTINGS)
    for key, value in settings.items():
        if before.get(key) != value:
            raise FolderMismatchError(
                f"statistics {str(path)!r} are of {key} {before.get(key)!r}, and it is {value!r} "
                "here: name another folder"
            )


class _Gradients(MutableMapping[str, Tensor]):
    """G from the release's file, whose keys are `self_attn.q_proj_layer_0`; the rest in memory."""

    def __init__(self, path: Path, store: Store) -> None:
        found = _load(path)
        self._own: dict[str, Tensor] = {}
        self._found = {}
        for number, block in enumerate(store.blocks):
            for layer in store.layers[block]:
                key = f"{layer.removeprefix(f'{block}.')}_layer_{number}"
                self._found[f"G/{layer}"] = _checked(found, key, layer, store, path)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._own:
            return self._own[key]
        return self._found[key].float()

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        self._own[key] = tensor

    def __delitem__(self, key: str) -> None:
        del self._own[key]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._found, **self._own})

    def __len__(self) -> int:
        return len({**self._found, **self._own})


def _load(path: Path) -> object:
    """Read a file of tensors, mapped, and never an object of a class that the file names."""
    try:
        open_plain(path).close()
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unsafe:
            raise ValueError(f"it names {unsafe[0]}, and only tensors are read")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"statistics file {str(path)!r} cannot be read: {error}") from error


def _checked(found: object, key: str, layer: str, store: Store, path: Path) -> Tensor:
    shape = store.dense(layer).shape
    tensor = found.get(key) if isinstance(found, dict) else None
    if not isinstance(tensor, Tensor) or tensor.shape != shape:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else "none"
        raise ValueError(
            f"statistics file {str(path)!r} must have {key} of shape {tuple(shape)}, got {got}: "
            "give the gradients of this model"
        )
    return tensor
