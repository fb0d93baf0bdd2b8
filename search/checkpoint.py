"""Checkpoints: a state of the search as JSON, so that a resumed run replays less; seeds."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import SCHEMA, existing, resolve_metric
from prunevolve.search.population import Record, State


def state_as_json(state: State) -> dict[str, object]:
    """Return the content of a checkpoint."""
    return {
        "schema": SCHEMA,
        "committed": state.committed,
        "population": [record.to_dict() for record in state.population],
        "hall_of_fame": [record.to_dict() for record in state.hall_of_fame],
    }


def read_state(path: Path) -> State:
    """Return the state in any run's checkpoint file.

    Raises:
        ValueError: If it cannot be read, is damaged or of another schema.
    """
    try:
        body = json.loads(path.read_bytes())
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']!r}, not {SCHEMA}")
        population, hall_of_fame = (
            tuple(Record.from_dict(fields) for fields in body[key])
            for key in ("population", "hall_of_fame")
        )
        return State(int(body["committed"]), population, hall_of_fame)
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is damaged, or from another version") from error


def check_fits(state: State, records: Sequence[Record], lag: int) -> None:
    """Raise ValueError if a search with these records cannot go on from a state.

    Its members must be those records, and it must be old enough to breed every child that is
    missing.
    """
    members = (*state.population, *state.hall_of_fame)
    if state.committed > max(0, len(records) - lag) or not all(
        member.index < state.committed and member == records[member.index] for member in members
    ):
        raise ValueError("checkpoint.json does not fit the journal")


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
