"""Records of which a test says no more than what it is about."""

from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.search.records import Candidate, Origin, Outcome, Record


def record_of(
    index: int,
    metric: str,
    fitness: float | None,
    group: str = "row",
    *,
    kind: str = "failed",
    fingerprint: str | None = "ab12",
    origin: Origin = "seed",
    parents: tuple[int, ...] = (),
    reason: str = "",
) -> Record:
    """Return an evaluated record, or one of another kind if it has no fitness."""
    criterion = Criterion(Metric.parse(metric), group)
    candidate = Candidate(index, criterion, origin, parents, fingerprint)
    return Record(candidate, Outcome(kind if fitness is None else "evaluated", fitness, 64, reason))
