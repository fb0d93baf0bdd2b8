"""The run folder: journal, checkpoint, hall of fame, best metric. Only this file writes there.

Everything is text or safetensors. Journal and losses are appended, flushed and fsync'd line by
line; every other file is written under a temporary name, fsync'd and renamed, so that a kill leaves
the old file or the new one, never a part.
"""

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prunevolve.command_line import SEARCH, Resumable, check_new_run, check_run
from prunevolve.command_line import FolderError as FolderError  # a public name
from prunevolve.pruning.checkpoint import write_tensors
from prunevolve.pruning.json_file import JsonObject, read_object, whole_file
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import SCHEMA
from prunevolve.search.records import Line, Losses, Record, Wanted, read_line

Parsed = TypeVar("Parsed", Record, Line)

JOURNAL, LOSSES = "journal.jsonl", "losses.jsonl"  # lines are appended; a kill can tear the last

_LOSSES = TypeAdapter(tuple[int, str, str | None, str, Losses])
"""A line of the latter: task, role of the text, metric, if any, and group, and losses."""


class WriteError(Resumable):
    """A file in the folder cannot be written; everything written before is intact."""


class RunFolder:
    """One run's folder. Use `create` for a new run and `open_` for an existing one."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, FileLock(path / ".lock")

    @staticmethod
    def create(path: Path) -> "RunFolder":
        """Create the folder of a new run; raise FolderError if it is not empty or is in use."""
        check_new_run(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"--out {path} cannot be created: {error.strerror}") from error
        return RunFolder(path)._locked()

    @staticmethod
    def open_(path: Path) -> "RunFolder":
        """Open a run's folder to go on; raise FolderError if it is none, or in use."""
        folder = RunFolder.look(path)._locked()
        for name in (JOURNAL, LOSSES):
            file, size = path / name, sum(map(len, folder._lines(name)))
            if file.exists() and file.stat().st_size > size:
                with _writing(file):
                    os.truncate(file, size)  # the torn last line
        return folder

    @staticmethod
    def look(path: Path) -> "RunFolder":
        """Return a run's folder for reading, even while another process works in it."""
        check_run(path)
        return RunFolder(path)

    def _locked(self) -> "RunFolder":
        with _writing(self.path / ".lock"):
            self._lock.acquire(timeout=0)
        return self

    def close(self) -> None:
        """Let other processes use the folder."""
        # Before the release: afterwards the file could be another process's lock.
        with suppress(OSError):  # if nothing can be written any more, it stays
            (self.path / ".lock").unlink()
        self._lock.release()

    @property
    def resume_command(self) -> str:
        """The command that goes on with the run."""
        return f"{SEARCH} --resume {shlex.quote(str(self.path))}"

    @property
    def is_in_use(self) -> bool:
        """Whether a process works in it; where the lock cannot be looked at, as if."""
        lock = self.path / ".lock"
        if not lock.exists():
            return False
        try:
            with FileLock(lock, timeout=0):  # a killed process leaves the file, not the lock
                return False
        except (OSError, Timeout):
            return True

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        path = self.path / name
        with _writing(path), whole_file(path) as draft:
            draft.write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: object) -> None:
        """Write a value as JSON, whole or not at all."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, f"{text}\n")

    def read_json(self, name: str, *keys: str) -> JsonObject:
        """Read a JSON object; raise FolderError if it is missing, damaged or lacks a key."""
        path = self.path / name
        with _reading(path):
            value = read_object(path)
        if missing := sorted(set(keys) - set(value)):
            raise FolderError(f"{path} lacks {', '.join(missing)}: it was changed or is too old")
        return value

    def summary(self) -> JsonObject | None:
        """Return what the run came to when it ended; None if it did not yet."""
        keys = ("best", "candidates", "path", "selection", "tasks", "verdict_kind")
        has_ended = (self.path / "summary.json").is_file()
        return self.read_json("summary.json", *keys) if has_ended else None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, whole or not at all."""
        path = self.path / name
        with _writing(path):
            write_tensors(path, {key: tensor.contiguous() for key, tensor in tensors.items()})

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Return a safetensors file's tensors; FolderError if damaged."""
        path = self.path / name
        with _reading(path):
            return load_file(path)

    def write_failure(self, name: str, trace: str) -> None:
        """Save the traceback of a failure as `failures/NAME.txt`."""
        with _writing(self.path / "failures"):
            (self.path / "failures").mkdir(exist_ok=True)
        self.write_text(f"failures/{name}.txt", trace)

    def records(self) -> list[Record]:
        """Return the records in the journal's whole lines, also while a process appends to it."""
        return self._read(Record.from_dict)

    def outcomes(self) -> list[tuple[str, float | None]]:
        """Return each record's outcome and fitness, without parsing its metric."""
        return [(line.outcome, line.fitness) for line in self._read(read_line)]

    def _read(self, parse: Callable[[object], Parsed]) -> list[Parsed]:
        parsed: list[Parsed] = []
        for index, line in enumerate(self._lines(JOURNAL)):
            try:
                parsed.append(parse(json.loads(line)))
                if parsed[-1].index != index:
                    raise ValueError(f"it is candidate {parsed[-1].index}")
            except (ValueError, RecursionError) as error:
                raise FolderError(
                    f"{self.path / JOURNAL} line {index + 1} is damaged: {error}; keep "
                    f"the {index} lines before it and resume: the rest is searched again"
                ) from error
        return parsed

    def _lines(self, name: str) -> list[bytes]:
        path = self.path / name
        with _reading(path):
            content = path.read_bytes() if path.exists() else b""
        return [line for line in io.BytesIO(content) if line.endswith(b"\n")]

    def append(self, record: Record, timing: Mapping[str, float]) -> None:
        """Append a record to the journal, and its timing to a file of its own."""
        timings = self.path / "timings.jsonl"
        with _writing(timings), timings.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": record.index, **timing}) + "\n")
        self._append(JOURNAL, record.to_dict())

    def keep_losses(self, wanted: Wanted, losses: Losses) -> None:
        """Append what was measured."""
        task, role, criterion = wanted
        text, group = (criterion.text, criterion.group) if criterion else (None, "")
        self._append(LOSSES, (task, role, text, group, losses))

    def losses(self) -> dict[Wanted, Losses]:
        """Return all that was kept; raises FolderError if a line is damaged."""
        measured: dict[Wanted, Losses] = {}
        for number, line in enumerate(self._lines(LOSSES), 1):
            try:
                task, role, text, group, losses = _LOSSES.validate_json(line)
                criterion = Criterion.parse(text, group) if text else None
            except ValueError as error:
                raise FolderError(
                    f"{self.path / LOSSES} line {number} is damaged: remove the line and resume: "
                    "its losses are measured again"
                ) from error
            measured[task, role, criterion] = losses
        return measured

    def _append(self, name: str, value: object) -> None:
        path = self.path / name
        with _writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_hall_of_fame(self, finalists: Sequence[JsonObject], hall: Sequence[Record]) -> None:
        """Write `hall_of_fame.csv`, by size: the best of each, and at the end all finalists."""
        rows: dict[str, JsonObject] = {str(record.index): record.described for record in hall}
        rows |= {str(row["name"]): row for row in finalists}
        columns = ("name", "size", "fitness", "group", "metric", "pareto")
        table, lowest = io.StringIO(), math.inf
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for name, row in sorted(rows.items(), key=lambda x: (x[1]["size"], x[1]["fitness"])):
            on_front = row["fitness"] < lowest
            lowest = min(lowest, row["fitness"])
            writer.writerow({**row, "name": name, "pareto": str(on_front).lower()})
        self.write_text("hall_of_fame.csv", table.getvalue())

    def front(self) -> list[dict[str, str]]:
        """Return the rows of `hall_of_fame.csv` that no smaller metric equals or beats."""
        path = self.path / "hall_of_fame.csv"
        if not path.is_file():
            return []
        with _reading(path), path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if row["pareto"] == "true"]

    def write_best(self, record: Record, provenance: Mapping[str, object]) -> None:
        """Write `best_metric.json`, which `run_prune.py --metric` reads."""
        metric = record.criterion.metric
        tree, leaves = metric.to_release_json(), sorted(metric.terminals)
        more = {"tree": tree, "leaves": leaves, "provenance": provenance}
        self.write_json("best_metric.json", {"schema": SCHEMA, **record.described, **more})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout as error:  # of the lock, which one process may hold
        raise FolderError(
            f"{path.parent} is in use by another process: wait for it to end"
        ) from error
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise WriteError(f"{path} cannot be written: {why}") from error
