"""Entries of `search.seeds`: a metric in any form, or another run's metrics."""

from collections.abc import Sequence
from pathlib import Path

from pruning.criterion import Criterion
from pruning.metric_file import existing, resolve_metric
from search.checkpoint import read_state


def read_seeds(entries: Sequence[str], group: str) -> list[Criterion]:
    """Return the criteria that entries stand for, in order, without repeats.

    From another run only texts are taken, never a fitness: its model, sparsity or texts may differ.
    The text of a criterion is an entry that stands for it without any other file.

    Args:
        entries: A metric's name, its text, a metric file, a run folder or its checkpoint.
        group: The comparison group that every seed gets.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    seeds: dict[Criterion, None] = {}
    for entry in entries:
        for criterion in _read(entry):
            seeds[Criterion(criterion.metric.check_scores_weights(), group)] = None
    return list(seeds)


def _read(entry: str) -> list[Criterion]:
    if path := _checkpoint_of(entry):
        state = read_state(path)
        seeds = [record.criterion for record in state.finalists(10**6)]
        # A checkpoint lags some outcomes behind, to be resumable: the run's best may be newer.
        best = path.parent / "best_metric.json"
        is_run_folder = Path(entry).name != path.name
        return [*_read(str(best)), *seeds] if is_run_folder and best.is_file() else seeds
    return [resolve_metric(entry).criterion]


def _checkpoint_of(entry: str) -> Path | None:
    """Return the checkpoint that an entry names, or that of the run folder that it names."""
    path = existing(entry)
    if path and (path / "checkpoint.json").is_file():
        return path / "checkpoint.json"
    is_checkpoint = path and path.name.startswith("checkpoint") and path.suffix == ".json"
    return path if is_checkpoint else None
