"""What an entry of `search.seeds` may be: a metric in any form, or another run's metrics."""

from collections.abc import Sequence
from pathlib import Path

from pruning.criterion import Criterion
from pruning.masks import GROUPS
from pruning.metric_file import resolve_metric
from search.checkpoint import read_state


def read_seeds(entries: Sequence[str], groups: Sequence[str]) -> list[Criterion]:
    """Return the criteria that entries mean, without repeats, in their order.

    Of another run only texts and groups are taken, never a fitness: its model, sparsity or texts
    may have been others. `str` of a criterion is an entry that means it without any other file.

    Args:
        entries: A metric's name, its text, a metric file, a run folder or its checkpoint; before
            any of them a comparison group and a colon, which then holds for all it means.
        groups: Those that are searched; where there is one, it is every seed's.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    seeds: dict[Criterion, None] = {}
    for entry in entries:
        prefix, colon, rest = entry.partition(":")
        asked = prefix if colon and prefix in GROUPS else ""
        for criterion in _read(rest if asked else entry):
            group = groups[0] if len(groups) == 1 else asked or criterion.group
            seeds[Criterion(criterion.metric.check_scores_weights(), group)] = None
    return list(seeds)


def _read(entry: str) -> list[Criterion]:
    if path := _checkpoint_of(entry):
        state = read_state(path)
        seeds = [record.criterion for record in state.finalists(10**6)]
        # A checkpoint is some outcomes old, so that it can be resumed: a run's best may be younger.
        best = path.parent / "best_metric.json"
        of_run = Path(entry).name != path.name
        return [*_read(str(best)), *seeds] if of_run and best.is_file() else seeds
    return [resolve_metric(entry).criterion]


def _checkpoint_of(entry: str) -> Path | None:
    """Return the checkpoint that an entry names, or the run folder that it names has."""
    try:
        path = Path(entry).expanduser()
        if (path / "checkpoint.json").is_file():
            return path / "checkpoint.json"
    except (OSError, RuntimeError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home
    return path if path.name.startswith("checkpoint") and path.suffix == ".json" else None
