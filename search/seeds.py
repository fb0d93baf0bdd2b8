"""What an entry of `search.seeds` may be: a metric in any form, or another run's metrics."""

from pathlib import Path

from pruning.masks import GROUPS
from pruning.metric import Metric
from pruning.metric_file import resolve_metric
from search.journal import checkpoint_state

Seed = tuple[Metric, str]
"""A metric and its comparison group."""


def read_seeds(entries: list[str], groups: tuple[str, ...]) -> list[Seed]:
    """Return the metrics that entries mean, without repeats, in their order.

    Of another run only texts and groups are taken, never a fitness: its model, sparsity or texts
    may have been others.

    Args:
        entries: A metric's name, its text, a metric file, a run folder or its checkpoint; before
            any of them a comparison group and a colon, which then holds for all it means.
        groups: Those that are searched; where there is one, it is every seed's.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    seeds: dict[Seed, None] = {}
    for entry in entries:
        prefix, colon, rest = entry.partition(":")
        asked = prefix if colon and prefix in GROUPS else ""
        for metric, own in _read(rest if asked else entry):
            group = groups[0] if len(groups) == 1 else asked or own
            seeds[metric.check_scores_weights(), group] = None
    return list(seeds)


def write_seeds(seeds: list[Seed]) -> list[str]:
    """Return entries that mean the same without any other file."""
    return [f"{group}:{metric.text}" for metric, group in seeds]


def _read(entry: str) -> list[Seed]:
    if path := _checkpoint_of(entry):
        state = checkpoint_state(path)
        seeds = [(Metric.parse(one.metric), one.group) for one in state.finalists(10**6)]
        # A checkpoint is some outcomes old, so that it can be resumed: a run's best may be younger.
        best = path.parent / "best_metric.json"
        of_run = Path(entry).name != path.name
        return [*_read(str(best)), *seeds] if of_run and best.is_file() else seeds
    found = resolve_metric(entry)
    return [(found.metric, found.group)]


def _checkpoint_of(entry: str) -> Path | None:
    """Return the checkpoint that an entry names, or the run folder that it names has."""
    try:
        path = Path(entry).expanduser()
        if (path / "checkpoint.json").is_file():
            return path / "checkpoint.json"
    except (OSError, RuntimeError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home
    return path if path.name.startswith("checkpoint") and path.suffix == ".json" else None
