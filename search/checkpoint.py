"""Checkpoints: a state of the search as JSON, with digests of itself and of the journal."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.metric_file import SCHEMA
from search.population import Record, State


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        lines: Number of lines in the journal at that time.
        journal: SHA-256 of those lines.
    """

    state: State
    lines: int
    journal: str

    def stood_beside(self, lines: Sequence[bytes]) -> bool:
        """Return whether a journal begins with the lines of that time; True if it is shorter."""
        if self.lines > len(lines):
            return True
        digest = hashlib.sha256(b"".join(lines[: self.lines])).hexdigest()
        return digest == self.journal


def to_dict(state: State, journal: Mapping[str, object]) -> dict[str, Any]:
    """Return a checkpoint as JSON.

    Args:
        state: The state that a continuation starts from.
        journal: The journal's number of `lines`, and their `sha256`.
    """
    body = {
        "schema": SCHEMA,
        "committed": state.committed,
        "population": [record.to_dict() for record in state.population],
        "hall_of_fame": [record.to_dict() for record in state.hall_of_fame],
        "began": state.began,
        "improved": state.improved,
        "journal": journal,
    }
    return {**body, "sha256": _digest(body)}


def parse(data: bytes) -> Checkpoint | None:
    """Return the checkpoint in a file's bytes, or None if it is damaged or of another schema."""
    try:
        body = json.loads(data)
        digest = body.pop("sha256")
        if digest != _digest(body) or body["schema"] != SCHEMA:
            return None
        population, hall_of_fame = (
            tuple(Record.from_dict(fields) for fields in body[key])
            for key in ("population", "hall_of_fame")
        )
        counts = body["began"], body["improved"]
        state = State(body["committed"], population, hall_of_fame, *counts)
        journal = body["journal"]
        return Checkpoint(state, journal["lines"], journal["sha256"])
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def read_state(path: Path) -> State:
    """Return the state in any run's checkpoint file.

    Raises:
        ValueError: If it cannot be read, is damaged or of another schema.
    """
    try:
        checkpoint = parse(path.read_bytes())
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not checkpoint:
        raise ValueError(f"checkpoint {path} is damaged, or from another version")
    return checkpoint.state


def hall_of_fame_csv(state: State) -> str:
    """Return the best of each size as a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["size", "fitness", "group", "metric", "pareto"])
    for record in state.hall_of_fame:
        on_front = str(record in state.pareto_front).lower()
        criterion = record.criterion
        writer.writerow([record.size, record.fitness, criterion.group, criterion.text, on_front])
    return text.getvalue()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
