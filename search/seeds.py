"""Entries of `search.seeds`: a metric in any form, or another run's metrics."""

from collections.abc import Sequence
from pathlib import Path

from pruning.criterion import Criterion
from pruning.masks import GROUPS
from pruning.metric_file import resolve_metric
from search.checkpoint import read_state


def read_seeds(entries: Sequence[str], groups: Sequence[str]) -> list[Criterion]:
    """Return the criteria that entries stand for, in order, without repeats.

    From another run only texts and groups are taken, never a fitness: its model, sparsity or texts
    may differ. `str` of a criterion is an entry that stands for it without any other file.

    Args:
        entries: A metric's name, its text, a metric file, a run folder or its checkpoint; a prefix
            of a comparison group and a colon sets the group of all criteria in the entry.
        groups: The groups searched; if there is only one, every seed gets it.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    seeds: dict[Criterion, None] = {}
    for entry in entries:
        prefix, colon, rest = entry.partition(":")
        given = prefix if colon and prefix in GROUPS else ""
        for criterion in _read(rest if given else entry):
            group = groups[0] if len(groups) == 1 else given or criterion.group
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
    try:
        path = Path(entry).expanduser()
        if (path / "checkpoint.json").is_file():
            return path / "checkpoint.json"
    except (OSError, RuntimeError):
        return None  # a formula can be too long for a file name; ~nobody has no home
    return path if path.name.startswith("checkpoint") and path.suffix == ".json" else None
