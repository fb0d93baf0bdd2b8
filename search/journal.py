"""The run folder: journal, checkpoint, hall of fame, best metric. Only this file writes there.

Everything is text or safetensors. The journal is appended, flushed and fsync'd line by line; every
other file is written beside its place, fsync'd and renamed, so that a kill leaves the old or the
new one, never a part.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plain_files import check_plain, read_bytes, read_lines, read_object
from pruning.headers import read_header
from pruning.metric import Metric
from pruning.metric_file import SCHEMA
from search.population import Record, State

MOST_BYTES = 20_000_000
"""Longest JSON file that is read; the checkpoint of the largest population is shorter."""

MOST_JOURNAL, LONGEST_LINE = 2_000_000_000, 1_000_000
"""Bytes of the longest journal that is read, of some million candidates, and of a line in it."""


class FolderError(ValueError):
    """The folder does not fit the request; the command line exits with 4."""


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Use `create` for a new run and `open_` for one that is there."""

    path: Path
    lock: FileLock

    @staticmethod
    def create(path: Path) -> "RunFolder":
        """Make the folder of a new run; raises FolderError if it is not empty or in use."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FolderError(
                f"--out {path} is not an empty folder: name another, or --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FolderError(f"--out {path} cannot be made: {error.strerror}") from error
        return _locked(path)

    @staticmethod
    def open_(path: Path) -> "RunFolder":
        """Open a run's folder; raises FolderError if it is none, in use or made to hang."""
        if not (path / "config.yaml").is_file():
            raise FolderError(f"{path} is not a run folder: it has no config.yaml")
        try:
            check_plain(path)
            check_plain(path, "*.json", MOST_BYTES)  # now, not after the statistics are collected
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} cannot be read: {error}") from error
        return _locked(path)

    def close(self) -> None:
        """Let other processes use the folder."""
        # Before the release: after it, the file could be another process's lock.
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        temporary = self.path / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str, *keys: str) -> Any:
        """Read a JSON object; raises FolderError if it is missing, damaged or lacks a key."""
        path = self.path / name
        try:
            value = read_object(path, MOST_BYTES)
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} cannot be read: {error}") from error
        if missing := sorted(set(keys) - set(value)):
            raise FolderError(f"{path} lacks {', '.join(missing)}: it was changed or is too old")
        return value

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, whole or not at all."""
        temporary = self.path / f"{name}.tmp"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Return a safetensors file's tensors, or None if it is not there.

        Raises:
            FolderError: If the file is damaged.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            read_header(path)
            return load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise FolderError(f"{path} cannot be read: {error}") from error

    def read_records(self) -> list[Record]:
        """Read the journal, cut a torn last line off it, and return its records.

        Raises:
            FolderError: If a whole line is damaged or out of order, or the file no journal.
        """
        path = self.path / "journal.jsonl"
        records: list[Record] = []
        whole = 0
        for line in self._lines(path):
            if not line.endswith(b"\n"):
                os.truncate(path, whole)
                break
            number, whole = len(records), whole + len(line)
            try:
                record = Record.from_dict(json.loads(line.rstrip(b"\n")))
            except (ValueError, RecursionError) as error:
                raise FolderError(f"{path} line {number + 1} is damaged: {error}") from error
            if record.index != number:
                raise FolderError(f"{path} line {number + 1} is candidate {record.index}")
            records.append(record)
        return records

    def _lines(self, path: Path) -> Iterator[bytes]:
        try:
            if path.exists():
                yield from read_lines(path, MOST_JOURNAL, LONGEST_LINE)
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} cannot be read: {error}") from error

    def append(self, record: Record, timing: Mapping[str, Any]) -> None:
        """Append a record to the journal, and what is not reproducible to the timings."""
        with (self.path / "timings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": record.index, **timing}) + "\n")
        with (self.path / "journal.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_timings(self) -> dict[int, dict[str, Any]]:
        """Return what was noted of each candidate's evaluation, by index: seconds and worker.

        Empty for candidates that cost no worker. A damaged line is passed over: timings are never
        needed to go on.
        """
        path = self.path / "timings.jsonl"
        timings = {}
        for line in self._lines(path):
            try:
                fields = json.loads(line)
                timings[int(fields.pop("index"))] = fields
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        return timings

    def write_checkpoint(self, resumable: State, state: State) -> None:
        """Write the checkpoint, keep the one before it, and rewrite the hall of fame.

        Args:
            resumable: The state that a continuation starts from, `lag` outcomes earlier.
            state: The state now, which the hall of fame shows.
        """
        body = {
            "schema": SCHEMA,
            "committed": resumable.committed,
            "population": [record.to_dict() for record in resumable.population],
            "hall_of_fame": [record.to_dict() for record in resumable.hall_of_fame],
            "began": resumable.began,
            "improved": resumable.improved,
        }
        current = self.path / "checkpoint.json"
        if current.exists():
            current.replace(self.path / "checkpoint.previous.json")
        self.write_json("checkpoint.json", {**body, "sha256": _digest(body)})
        self.write_text("hall_of_fame.csv", _hall_of_fame_csv(state))

    def read_checkpoint(self, records: int) -> State:
        """Return the newest valid checkpoint's state, or the empty state if there is none.

        Args:
            records: Length of the journal: a checkpoint beyond it is not used.
        """
        for name in ("checkpoint.json", "checkpoint.previous.json"):
            try:
                state = _state_of(read_bytes(self.path / name, MOST_BYTES))
            except (OSError, ValueError):
                continue  # not there, or no checkpoint
            if state and state.committed <= records:
                return state
        return State()

    def write_best(self, record: Record, provenance: Mapping[str, Any]) -> None:
        """Write `best_metric.json`, which `run_prune.py --metric` reads."""
        metric = Metric.parse(record.metric)
        self.write_json(
            "best_metric.json",
            {
                "schema": SCHEMA,
                "metric": metric.text,
                "tree": metric.to_release_json(),
                "group": record.group,
                "leaves": sorted(metric.leaves),
                "fitness": record.fitness,
                "size": metric.size,
                "provenance": dict(provenance),
            },
        )


def checkpoint_state(path: Path) -> State:
    """Return the state in a checkpoint file, of any run.

    Raises:
        ValueError: If it cannot be read, is damaged or of another schema.
    """
    try:
        state = _state_of(read_bytes(path, MOST_BYTES))
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    if not state:
        raise ValueError(f"checkpoint {path} is damaged, or from another version")
    return state


def _locked(path: Path) -> RunFolder:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FolderError(f"{path} is in use by another process: wait for it to end") from error
    return RunFolder(path, lock)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _state_of(data: bytes) -> State | None:
    """Return a checkpoint's state, or None if it is damaged or of another schema."""
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        if digest != _digest(body) or body["schema"] != SCHEMA:
            return None
        members = {
            key: tuple(Record.from_dict(fields) for fields in body[key])
            for key in ("population", "hall_of_fame")
        }
        counts = [body.get(key, 0) for key in ("began", "improved")]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return State(body["committed"], members["population"], members["hall_of_fame"], *counts)


def _hall_of_fame_csv(state: State) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "fitness", "group", "metric", "pareto"])
    for record in state.hall_of_fame:
        on_front = str(record in state.pareto_front).lower()
        writer.writerow([record.size, record.fitness, record.group, record.metric, on_front])
    return text.getvalue()
