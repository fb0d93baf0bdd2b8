"""A result's folder: shards, configs, tokenizer, recipe and report; kept statistics.

While a pruning works, everything is below `OUT/.unfinished` and moved to its final name at the end,
the report last. What a killed run leaves there is the state that it is resumed from: every shard
that has its name is whole, and `run.json` holds a `Run`.
"""

import errno
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from threading import Lock

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel
from torch import Tensor

from prunevolve.command_line import FolderError
from prunevolve.pruning.checkpoint import DiskOffload, Offload, files_beside
from prunevolve.pruning.json_file import JsonObject, finite, read_object, write_json
from prunevolve.pruning.masks import CROWDED
from prunevolve.pruning.models import shapes_of, width_key
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.run.card import model_card
from prunevolve.pruning.run.options import UNFINISHED
from prunevolve.pruning.run.verify import RECIPE, REPORT, Inspector, first_difference
from prunevolve.pruning.store import FolderStore, Store

RUN = "run.json"
SETTINGS = "statistics.json"


class Run(BaseModel):
    """What was asked, what the result depends on, and what was found out so far."""

    options: JsonObject
    identity: JsonObject
    # Of evaluation windows, `dense` and `pruned`; None if not finite.
    losses: dict[str, list[float | None]] = {}
    training: dict[str, JsonObject] = {}  # errors of trained blocks
    damping: dict[str, int] = {}  # how many times that of a layer's Gram matrix grew
    # Losses of held-back windows `with` the update, `half` of it and `without`, and the `part` of
    # the way that they chose.
    guard: JsonObject = {}
    zero_shot: dict[str, JsonObject] = {}  # `dense` and `pruned`
    sha256: dict[str, str] = {}  # of finished shards

    @staticmethod
    def read(out: Path) -> "Run":
        """Read that of an unfinished folder; raises FolderError if it has none."""
        try:
            return Run.model_validate(read_object(out / UNFINISHED / RUN))
        except OSError as error:
            raise FolderError(
                f"{str(out)!r} has no unfinished pruning: {error.strerror}"
            ) from error


class WorkFolder:
    """The unfinished part of a result's folder, and what is known of the run."""

    def __init__(self, out: Path, options: JsonObject, identity: JsonObject) -> None:
        self.out, self.path = out, out / UNFINISHED
        self.result = self.path / "result"
        self.states = self.path / "states"
        self.statistics = self.path / "statistics"
        self.run = Run(options=options, identity=identity)
        self._lock = Lock()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Begin the work, or go on with it, while no other process does.

        Raises FolderError if another does, it was begun with something else, or the folder
        cannot be written.
        """
        try:
            self.result.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / "lock").acquire(timeout=0):
                self._begin()
                yield
        except Timeout as error:
            raise FolderError(
                f"out {str(self.out)!r} is in use by another process: wait, or name another folder"
            ) from error
        except (BrokenPipeError, FolderError):  # a reader that is gone is as an interrupt
            raise
        except OSError as error:
            self.forget_work()
            refused = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            way_out = "make it writable" if refused else "make room"
            raise FolderError(
                f"out {str(self.out)!r} cannot be written ({error.strerror or error}): {way_out} "
                "and go on with --resume"
            ) from error
        except ValueError:
            # What a request that cannot be met has written goes, but no shard; all others keep it.
            if not any(self.result.glob("*.safetensors")):
                shutil.rmtree(self.path, ignore_errors=True)
                with suppress(OSError):  # it held something before
                    self.out.rmdir()
            raise

    def _begin(self) -> None:
        asked = self.run.identity
        if (self.path / RUN).exists():
            self.run = Run.read(self.out)
        if difference := first_difference(self.run.identity, asked):
            raise FolderError(
                f"out {str(self.out)!r} was begun with {difference} now: give what it began "
                "with, or name a new folder"
            )
        self.keep("sha256", {})

    def procedure(self, asked: Procedure) -> Procedure:
        """Return what is left to do of a procedure, given what came of its guard before."""
        if not self.run.guard:
            return asked
        part = self.run.guard["part"]
        return replace(asked, part=part) if part < 1 else replace(asked, guarded=False)

    def keep(self, kind: str, values: JsonObject) -> None:
        """Add values to those of their kind in `run.json`; any thread may do it."""
        with self._lock:
            if kind == "guard" and values["part"] < 1:
                self.run.sha256.clear()  # shards are replaced
            getattr(self.run, kind).update(finite(values))
            write_json(self.path / RUN, self.run.model_dump())

    def forget_work(self) -> None:
        """Remove what was put aside on disk for the passes; finished shards stay."""
        for folder in (self.states, self.statistics):
            shutil.rmtree(folder, ignore_errors=True)


def publish(out: Path) -> JsonObject:
    """Give every file of a result its final name, the report last; return the report."""
    files = (out / UNFINISHED / "result").glob("*")
    for path in sorted(files, key=lambda path: (path.name == REPORT, path.name)):
        path.replace(out / path.name)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    return read_object(out / REPORT)


def save_model(store: FolderStore, inspector: Inspector, on_progress: Progress = unwatched) -> None:
    """Make a model that can be loaded of a store's shards, and check that it is pruned.

    Those that the inspector did not look at yet are read back. Configs and tokenizer are copied.
    """
    folder, target = store.shard(None).parent, inspector.target
    store.write_outside()
    width = target.group.width(shapes_of(store.model), target.sparsity)
    for path in files_beside(store.checkpoint.path):
        shutil.copyfile(path, folder / path.name)
        if path.name in ("config.json", "tokenizer_config.json"):
            content = read_object(path)
            # It names code, which is not in the folder.
            changed = content.pop("auto_map", None) is not None
            if width and path.name == "config.json":
                content.get("text_config", content)[width_key(inspector.config)] = width[1]
                changed = True
            if changed:
                write_json(folder / path.name, content)
    inspector.look_at_all(folder, "save", on_progress)
    inspector.check_promise()


def save_report(
    folder: Path, recipe: JsonObject, measured: JsonObject, inspector: Inspector
) -> None:
    """Write a model's recipe, card and report, the report last."""
    layers, warnings = inspector.layers, [*measured["warnings"]]
    if crowded := [layer for layer in layers if layer.zeros > CROWDED * layer.size]:
        worst = max(crowded, key=lambda layer: layer.zeros / layer.size)
        more = f", and {len(crowded) - 1} of {len(layers)} are above {CROWDED:.0%}"
        line = f"layer {worst.name} is {worst.zeros / worst.size:.1%} zeros"
        warnings.append(line + more * (len(crowded) > 1))
    share = sum(layer.zeros for layer in layers) / sum(layer.size for layer in layers)
    if share > recipe["sparsity"] + 0.005:
        asked = f"{recipe['sparsity']:.1%} were asked for"
        warnings.append(f"{share:.1%} zeros where {asked}: the model had some before")
    report = {key: recipe[key] for key in ("metric", "pattern", "sparsity")} | measured
    report |= {"warnings": warnings, "layers": [asdict(layer) for layer in layers]}
    versions = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            versions[name] = metadata.version(name)
    sums = dict(sorted(inspector.sums.items()))
    write_json(folder / RECIPE, recipe | {"versions": versions, "sha256": sums})
    (folder / "README.md").write_text(model_card(recipe, report), encoding="utf-8")
    write_json(folder / REPORT, report)


def kept_statistics(path: Path, identity: JsonObject, store: Store) -> Offload:
    """Open the statistics that are kept at a path, by `G/layer`; new ones are kept there too.

    It is a folder, made if it is not there, for one model, calibration and dtype; or a `.pth` file,
    the gradients that the release of Pruner-Zero or GBLM saved, to which nothing is added.
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
        raise FolderError(f"statistics {str(path)!r} {problem}: name another folder")
    return kept


def _released_gradients(path: Path, store: Store) -> Offload:
    """Return G from a file whose keys are `self_attn.q_proj_layer_0`; mapped until it is used."""
    try:
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            raise ValueError(f"it names {unsafe[0]}, and only tensors are read")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"statistics file {str(path)!r} cannot be read: {error}") from error
    gradients = {}
    for number, block in enumerate(store.blocks):
        for layer in store.layers[block]:
            key = f"{layer.removeprefix(f'{block}.')}_layer_{number}"
            gradient = content.get(key) if isinstance(content, dict) else None
            shape, got = (tuple(getattr(x, "shape", ())) for x in (store.dense(layer), gradient))
            if not isinstance(gradient, Tensor) or got != shape:
                raise ValueError(
                    f"statistics file {str(path)!r} must have {key} of shape {shape}, got {got}: "
                    "give the gradients of this model"
                )
            gradients[f"G/{layer}"] = gradient
    return gradients
