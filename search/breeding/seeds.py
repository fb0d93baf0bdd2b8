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
        entries: A metric's name, its text, a metric file or a run folder.
        group: The comparison group that every seed gets.

    Raises:
        ValueError: If an entry is none of these, or its metric cannot rank weights.
    """
    read = [criterion for entry in entries for criterion in _criteria_of(entry)]
    seeds = (Criterion(seed.metric.check_scores_weights(), group) for seed in read)
    return list(dict.fromkeys(seeds))


def _criteria_of(entry: str) -> Iterable[Criterion]:
    yield read_metric(entry)  # of a run its best
    path = existing(entry)
    if path and (path / "checkpoint.json").is_file():
        # Some outcomes behind, so that the best may be newer than its members.
        state = read_state(path / "checkpoint.json")
        yield from (record.criterion for record in state.finalists(None))
