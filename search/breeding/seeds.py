"""The first candidates of a search: formulas that are named, written down or found before."""

from collections.abc import Iterable, Sequence

from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import existing, read_metric
from prunevolve.search.population import read_state


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
            yield read_metric(str(path / "best_metric.json"))
        path /= "checkpoint.json"
    elif not (path and path.name.startswith("checkpoint") and path.suffix == ".json"):
        yield read_metric(entry)
        return
    yield from (record.criterion for record in read_state(path).finalists(None))
