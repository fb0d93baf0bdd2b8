"""`--statistics`: a folder of statistics that are used again, or the release's gradients."""

from pathlib import Path

import torch
from torch import Tensor

from prunevolve.pruning.checkpoint import DiskOffload, Offload
from prunevolve.pruning.json_file import JsonObject, read_object, write_json
from prunevolve.pruning.run.verify import FolderMismatchError, first_difference
from prunevolve.pruning.store import Store

SETTINGS = "statistics.json"


def kept_statistics(path: Path, identity: JsonObject, store: Store) -> Offload:
    """Open the statistics that are kept at a path, by `G/layer`; new ones are kept there too.

    Args:
        path: A folder, made if it is not there; or a `.pth` file, the gradients that the release of
            Pruner-Zero or GBLM saved, to which nothing is added.
        identity: What the result depends on; model, calibration and dtype are looked at.
    """
    if path.suffix == ".pth":
        return _released_gradients(path, store)
    settings = {key: identity[key] for key in ("model", "calibration", "dtype")}
    file, problem = path / SETTINGS, ""
    try:
        kept = DiskOffload(path)
        if not any(path.iterdir()):
            write_json(file, settings)
    except OSError as error:
        raise ValueError(f"statistics {str(path)!r} cannot be made: {error}") from error
    if not file.is_file():
        problem = f"has no {SETTINGS} and is not empty"
    elif difference := first_difference(read_object(file), settings):
        problem = f"are of {difference} here"
    if problem:
        raise FolderMismatchError(f"statistics {str(path)!r} {problem}: name another folder")
    return kept


def _released_gradients(path: Path, store: Store) -> Offload:
    """Return G from a file whose keys are `self_attn.q_proj_layer_0`; mapped until it is used."""
    try:
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            raise ValueError(f"it names {unsafe[0]}, and only tensors are read")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"statistics file {str(path)!r} cannot be read: {error}") from error
    gradients = {}
    for number, block in enumerate(store.blocks):
        for layer in store.layers[block]:
            key = f"{layer.removeprefix(f'{block}.')}_layer_{number}"
            gradient = found.get(key) if isinstance(found, dict) else None
            shape, got = (tuple(getattr(x, "shape", ())) for x in (store.dense(layer), gradient))
            if not isinstance(gradient, Tensor) or got != shape:
                raise ValueError(
                    f"statistics file {str(path)!r} must have {key} of shape {shape}, got {got}: "
                    "give the gradients of this model"
                )
            gradients[f"G/{layer}"] = gradient
    return gradients
