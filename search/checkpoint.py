"""Checkpoints: a state of the search as JSON, with digests of itself and of the journal; seeds."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.metric_file import SCHEMA, existing, resolve_metric
from prunevolve.search.population import Record, State


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

    def to_dict(self) -> dict[str, object]:
        """Return a checkpoint as JSON."""
        body = {
            "schema": SCHEMA,
            "committed": self.state.committed,
            "population": [record.to_dict() for record in self.state.population],
            "hall_of_fame": [record.to_dict() for record in self.state.hall_of_fame],
            "journal": {"lines": self.lines, "sha256": self.journal},
        }
        return {**body, "sha256": _digest(body)}

    @staticmethod
    def parse(data: bytes) -> "Checkpoint | None":
        """Return the checkpoint in a file's bytes; None if it is damaged or of another schema."""
        try:
            body = json.loads(data)
            digest = body.pop("sha256")
            if digest != _digest(body) or body["schema"] != SCHEMA:
                return None
            population, hall_of_fame = (
                tuple(Record.from_dict(fields) for fields in body[key])
                for key in ("population", "hall_of_fame")
            )
            state = State(body["committed"], population, hall_of_fame)
            return Checkpoint(state, body["journal"]["lines"], body["journal"]["sha256"])
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return None


def _digest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> State:
    """Return the state in any run's checkpoint file.

    Raises:
        ValueError: If it cannot be read, is damaged or of another schema.
    """
    try:
        checkpoint = Checkpoint.parse(path.read_bytes())
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


def read_seeds(entries: Sequence[str], group: str) -> list[Criterion]:
    """Return the criteria that entries of `search.seeds` stand for, in order, without repeats.

    From another run only texts are taken, never a fitness: its model, sparsity or texts may differ.
    The text of a criterion is an entry that stands for it without any other file.

    Args:
        entries: A metric's name, its text, a metric file, a run folder or its checkpoint.
        group: The comparison group that every seed gets.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    read = [criterion for entry in entries for criterion in _criteria_of(entry)]
    seeds = (Criterion(seed.metric.check_scores_weights(), group) for seed in read)
    return list(dict.fromkeys(seeds))


def _criteria_of(entry: str) -> Iterable[Criterion]:
    path = existing(entry)
    if path and (path / "checkpoint.json").is_file():
        # A checkpoint lags some outcomes behind, to be resumable: the run's best may be newer.
        if (path / "best_metric.json").is_file():
            yield resolve_metric(str(path / "best_metric.json")).criterion
        path /= "checkpoint.json"
    elif not (path and path.name.startswith("checkpoint") and path.suffix == ".json"):
        yield resolve_metric(entry).criterion
        return
    yield from (record.criterion for record in read_state(path).finalists(10**6))
