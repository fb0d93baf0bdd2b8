"""A result's folder: shards, configs, tokenizer, recipe, model card and report.

While a pruning works, everything is below `OUT/.unfinished` and moved to its final name at the end,
the report last. What a killed run leaves there is the state that it is resumed from: every shard
that has its name is whole, and `run.json` says what was asked for and what was found out.
"""

import math
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from prunevolve.evaluation import zero_shot
from prunevolve.pruning.json_file import JsonObject, read_object, write_json
from prunevolve.pruning.masks import CROWDED
from prunevolve.pruning.metric import Metric
from prunevolve.pruning.progress import Progress, unwatched
from prunevolve.pruning.run.verify import (
    RECIPE,
    REPORT,
    Counted,
    FolderMismatchError,
    Inspector,
    LayerCount,
)
from prunevolve.pruning.statistics import LEAVES
from prunevolve.pruning.store import FolderStore

UNFINISHED = ".unfinished"


class WorkFolder:
    """The unfinished part of a result's folder; `work_folder` opens one.

    Attributes:
        run: What `run.json` holds: the request's `options`, the `identity` of all that the result
            depends on, the `sha256` that its files should have if they are known, and what was
            `found` so far: losses by stream, the layers' shares, the errors of a training,
            zero-shot results by model.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / UNFINISHED
        self.result = self.path / "result"
        self.states = self.path / "states"
        self.statistics = self.path / "statistics"
        self._file = self.path / "run.json"
        self.run: JsonObject = read_object(self._file) if self._file.exists() else {}

    @property
    def found(self) -> JsonObject:
        """What was found out so far, by name."""
        return dict(self.run["found"])

    def begin(
        self, options: JsonObject, identity: JsonObject, sha256: Mapping[str, str] | None
    ) -> None:
        """Write down what is asked, or compare it with what was.

        Raises:
            FolderMismatchError: If the folder belongs to another request.
        """
        if self.run:
            if difference := first_difference(self.run["identity"], identity):
                raise FolderMismatchError(
                    f"out {str(self.out)!r} was begun with {difference} now: give what it began "
                    "with, or name a new folder"
                )
        else:
            self.run = {"options": options, "identity": identity, "sha256": sha256, "found": {}}
            write_json(self._file, self.run)

    def keep(self, name: str, value: object) -> None:
        """Put something that was found out aside."""
        self.run["found"][name] = value
        write_json(self._file, self.run)

    def forget_work(self) -> None:
        """Remove what was put aside on disk for the passes; finished shards stay."""
        for folder in (self.states, self.statistics):
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self) -> JsonObject:
        """Give every file of the result its final name, the report last; return the report."""
        files = sorted(self.result.iterdir(), key=lambda path: (path.name == REPORT, path.name))
        for path in files:
            path.replace(self.out / path.name)
        shutil.rmtree(self.path)
        return read_object(self.out / REPORT)


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """Open the work folder of a result, for this process alone.

    Raises:
        FolderMismatchError: If another process works in it, or it cannot be read or written.
    """
    path = out / UNFINISHED
    try:
        (path / "result").mkdir(parents=True, exist_ok=True)
        with FileLock(path / "lock").acquire(timeout=0):
            yield WorkFolder(out)
    except Timeout as error:
        raise FolderMismatchError(
            f"out {str(out)!r} is in use by another process: wait, or name another folder"
        ) from error
    except BrokenPipeError:  # the output's reader is gone: as after an interrupt
        raise
    except OSError as error:
        WorkFolder(out).forget_work()
        reason = error.strerror or str(error)
        raise FolderMismatchError(
            f"out {str(out)!r} cannot be written ({reason}): make room and go on with --resume"
        ) from error
    except FolderMismatchError:
        raise
    except (ValueError, RuntimeError):
        # What a request that cannot be met has written goes; an interrupt keeps it.
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # it held something before
            out.rmdir()
        raise


def read_unfinished(out: Path) -> JsonObject:
    """Return what an unfinished folder's `run.json` holds.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        return read_object(out / UNFINISHED / "run.json")
    except OSError as error:
        raise ValueError(f"{str(out)!r} has no unfinished pruning: {error.strerror}") from error


def check_output_folder(folder: Path, size: int, resume: bool = False) -> None:
    """Check that a result can be written into a folder, without creating it.

    Args:
        folder: An empty folder, one that is not there yet, or with `resume` an unfinished one.
        size: Bytes that will be written.

    Raises:
        FolderMismatchError: If it is a file, holds something, or the disk has less room.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    unfinished = (folder / UNFINISHED).is_dir()
    problem = ""
    if not parent.is_dir():
        problem = f": {parent} is a file; name a new folder"
    elif unfinished and not resume:
        problem = f" is unfinished: go on with --resume {folder}, or name a new folder"
    elif not unfinished and parent == folder and any(folder.iterdir()):
        problem = " is not empty: name a new folder"
    if problem:
        raise FolderMismatchError(f"out {str(folder)!r}{problem}")
    there = sum(p.stat().st_size for p in (folder / UNFINISHED).rglob("*") if p.is_file())
    free = shutil.disk_usage(parent).free + there
    if size > free:
        raise FolderMismatchError(
            f"out {str(folder)!r} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB "
            "left: name a folder on another disk"
        )


def first_difference(before: JsonObject, now: JsonObject) -> str | None:
    """Say for the first key in which two mappings differ what both have; None if there is none."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            return f"{key} {before.get(key)!r}, and it is {now.get(key)!r}"
    return None


def save_model(
    store: FolderStore,
    tokenizer: PreTrainedTokenizerBase,
    inspector: Inspector,
    on_progress: Progress = unwatched,
) -> Counted:
    """Make a folder of shards a model that can be loaded, and return what is in it.

    Args:
        store: Has written a shard for every block into its folder.
        inspector: Has looked at some of the shards, and looks at the others.
        on_progress: Told how many of the files that were not looked at yet have been read back.

    Raises:
        FolderMismatchError: If the folder cannot be written, or what is read back from it does
            not hold what the target asks.
    """
    folder = store.shard(None).parent
    try:
        store.write_outside()
        store.config.save_pretrained(folder)
        # A model without a generation config, or with one that transformers refuses to write.
        with suppress(OSError, ValueError):
            GenerationConfig.from_pretrained(store.checkpoint.place).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        counted = inspector.look_at_all(folder, "save", on_progress)
    except SafetensorError as error:
        raise FolderMismatchError(f"{str(folder)!r} cannot be written: {error}") from error
    inspector.check_promise(folder)
    return counted


def save_papers(folder: Path, recipe: JsonObject, measured: JsonObject, counted: Counted) -> None:
    """Write a model's recipe, card and report, the report last.

    Args:
        recipe: All that is needed to do it again; versions and checksums are added.
        measured: What the report says beside what is counted.
    """
    layers, sums = counted
    report = {key: recipe[key] for key in ("metric", "pattern", "sparsity")} | finite(measured)
    report["warnings"] = [*measured["warnings"], *_crowded(layers)]
    report["layers"] = [asdict(layer) for layer in layers]
    write_json(folder / RECIPE, {**recipe, "versions": _versions(), "sha256": sums})
    (folder / "README.md").write_text(model_card(recipe, report), encoding="utf-8")
    write_json(folder / REPORT, report)


def _crowded(layers: Sequence[LayerCount]) -> list[str]:
    """Return one warning about all layers of which little is left, or none."""
    crowded = [layer for layer in layers if layer.zeros > CROWDED * layer.size]
    if not crowded:
        return []
    worst = max(crowded, key=lambda layer: layer.zeros / layer.size)
    more = f", and {len(crowded) - 1} of {len(layers)} are above {CROWDED:.0%}"
    told = f"layer {worst.name} is {worst.zeros / worst.size:.1%} zeros"
    return [told + more * (len(crowded) > 1)]


def finite(numbers: JsonObject) -> JsonObject:
    """Return figures with None for one that is not finite, since JSON has no infinity."""
    result = dict(numbers)
    for key, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            result[key] = None
        elif key == "by_text":
            result[key] = [finite(text) for text in value]
    return result


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("prunevolve", "torch", "transformers", "safetensors"):
        with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
            versions[name] = metadata.version(name)
    return versions


CARD = """# {base}, pruned: {pattern}, {sparsity:.1%} zeros

In every linear layer of the decoder blocks the weights with the lowest score are zero. The license
of the base model applies.

- Score: `{metric}`{formula}, compared within: {group}
- Allocation over layers: {allocation}; refinement of masks: {refine}; update: {update}
- Calibrated on: {calibration}

| model | perplexity ({place}) |
|---|---|
| dense | {dense} |
| pruned | {pruned} |
{more}
Zeros take the same space on disk and the same time to multiply; only a 2:4 pattern can be faster,
and it needs a kernel for it. `pruning_report.json` says what is in each layer, and
`pruning_recipe.json` how to do it again, where the same model and texts are:

```
python run_prune.py --recipe pruning_recipe.json --out DIR
```
"""


def model_card(recipe: JsonObject, report: JsonObject) -> str:
    """Return the card of a pruned model; it names no license, since the base model's applies."""
    model, formula = recipe["model"], ""
    if "tree" in recipe:
        metric = Metric.parse(report["metric"])
        named = [f"{name} is the {LEAVES[name].meaning}" for name in sorted(metric.leaves)]
        formula = f", that is {metric.infix}, where {', '.join(named)}"
    warnings = [f"\nWarning: {line}.\n" for line in report["warnings"]]
    values = {
        "base": Path(model).resolve().name if Path(model).is_dir() else model,  # no path
        "formula": formula,
        "group": recipe["group"] or "groups of the pattern",
        "calibration": _place(recipe["calibration"]) if recipe["calibration"] else "no text",
        "place": f"{_place(report['perplexity_of'])}, {report['perplexity_of']['dtype']}",
        "dense": _number(report["dense_perplexity"]),
        "pruned": _number(report["pruned_perplexity"]),
        "more": "\n".join(["", *zero_shot.lines(report), *warnings]),
    }
    return CARD.format_map(recipe | values)


def _place(provenance: JsonObject) -> str:
    """Say where windows come from, without the path to a local file."""
    corpus = Path(provenance["corpus"]).name
    return f"{corpus}, split {provenance['split']}, {provenance['windows']} windows of " + (
        f"{provenance['length']} = {provenance['tokens']} tokens"
    )


def _number(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.4g}"
