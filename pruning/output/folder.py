"""The folder of a pruning under way: inside the result's folder, gone when the result is whole.

Everything is written below `OUT/.unfinished` and moved to its final name at the end, the report
last. What a killed run leaves there is the state that it is resumed from: every shard that has its
name is whole, and `request.json` says what it is a shard of.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from prunevolve.pruning.json_file import JsonObject, read_object, write_json

UNFINISHED = ".unfinished"
REPORT = "pruning_report.json"


class FolderMismatchError(ValueError):
    """A folder does not fit what is asked of it."""

    exit_code = 4


class WorkFolder:
    """The unfinished part of a result's folder; `work_folder` opens one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / UNFINISHED
        self.result = self.path / "result"
        self.states = self.path / "states"
        self.statistics = self.path / "statistics"

    @property
    def is_whole(self) -> bool:
        """Whether the result has only to be moved to its place."""
        return (self.result / REPORT).exists()

    def known(self) -> JsonObject:
        """Return what a run has found out so far, by name.

        Losses by stream, the layers' shares, the errors of a training, zero-shot results by model
        (`dense zero-shot`).
        """
        path = self.path / "known.json"
        return read_object(path) if path.exists() else {}

    @property
    def asked(self) -> Path:
        """The file with what was asked for, from which a run can go on without being told again."""
        return self.path / "asked.json"

    def keep(self, name: str, value: object) -> None:
        """Put something that was found out aside."""
        write_json(self.path / "known.json", self.known() | {name: value})

    def forget_work(self) -> None:
        """Remove what was put aside on disk for the walks; finished shards stay."""
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
def work_folder(out: Path, request: JsonObject, resume: bool) -> Iterator[WorkFolder]:
    """Open the work folder of a result, for this process alone.

    Args:
        request: All that the result depends on, JSON-able.
        resume: Whether to go on with what is there.

    Raises:
        FolderMismatchError: If the folder belongs to another request, with the first difference,
            or another process works in it.
    """
    work = WorkFolder(out)
    try:
        work.result.mkdir(parents=True, exist_ok=True)
        with FileLock(work.path / "lock").acquire(timeout=0):
            _check_request(work, request, resume)
            yield work
    except Timeout as error:
        raise FolderMismatchError(
            f"out {str(out)!r} is in use by another process: wait, or name another folder"
        ) from error
    except BrokenPipeError:  # the output's reader is gone: as after an interrupt
        raise
    except OSError as error:
        work.forget_work()
        reason = error.strerror or str(error)
        raise FolderMismatchError(
            f"out {str(out)!r} cannot be written ({reason}): make room and go on with --resume"
        ) from error
    except FolderMismatchError:
        raise
    except (ValueError, RuntimeError):
        # What a request that cannot be met has written goes; an interrupt keeps it.
        shutil.rmtree(work.path, ignore_errors=True)
        with suppress(OSError):  # it held something before
            work.out.rmdir()
        raise


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


def _check_request(work: WorkFolder, request: JsonObject, resume: bool) -> None:
    """Write down what is asked, or compare it with what was."""
    path = work.path / "request.json"
    if not path.exists():
        write_json(path, request)
        return
    assert resume
    try:
        before = read_object(path)
    except (OSError, ValueError) as error:
        raise FolderMismatchError(f"{error}: name a new folder") from error
    if difference := first_difference(before, request):
        raise FolderMismatchError(
            f"out {str(work.out)!r} was begun with {difference} now: give what it began with, or "
            "name a new folder"
        )
