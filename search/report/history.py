"""What a journal tells about a search: pace, outcomes, operators in use, lines of descent."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from pruning.metric import Metric
from search.population import OUTCOMES, Record


def elapsed_seconds(count: int, timings: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """Estimate when each candidate's outcome was there, in seconds of a search without pauses.

    It is the time that the workers were busy with this and all earlier candidates, divided by the
    number of workers: idle workers, stops and resumes are not in it.
    """
    workers = {timing["worker"] for timing in timings.values() if "worker" in timing}
    busy = (timings.get(index, {}).get("seconds", 0.0) for index in range(count))
    return [total / max(1, len(workers)) for total in accumulate(busy)]


def bins(count: int, most: int = 24) -> list[range]:
    """Split the candidates 0 .. count - 1 into at most `most` ranges of one width."""
    width = max(1, -(-count // most))
    return [range(start, min(start + width, count)) for start in range(0, count, width)]


def outcomes_by_bin(records: Sequence[Record], spans: Sequence[range]) -> dict[str, list[int]]:
    """Return how many candidates of each span came to each kind of outcome; no row of zeros."""
    counts = [Counter(records[index].outcome.kind for index in span) for span in spans]
    rows = {kind: [count[kind] for count in counts] for kind in OUTCOMES}
    return {kind: row for kind, row in rows.items() if any(row)}


def shares_by_bin(
    records: Sequence[Record], spans: Sequence[range]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return leaves and operators, each with the share of a span's metrics that contain it.

    Every metric that was bred counts, whatever became of it. All numbers count as one leaf. The
    most frequent comes first.
    """
    held = [{(bool(n.operands), _name(n)) for n in r.criterion.metric.nodes()} for r in records]
    totals = Counter(kind for kinds in held for kind in kinds)
    leaves, operators = (
        {
            kind[1]: [sum(kind in held[index] for index in span) / len(span) for span in spans]
            for kind, _ in totals.most_common()
            if kind[0] == inner
        }
        for inner in (False, True)
    )
    return leaves, operators


def ancestry(records: Sequence[Record], start: Record) -> list[tuple[int, Record]]:
    """Return a record and all its ancestors with their distance, nearest first, each one once."""
    found, known, current, distance = [(0, start)], {start.index}, [start], 0
    while current:
        distance += 1
        parents = {parent for record in current for parent in record.candidate.parents} - known
        known |= parents
        current = [records[parent] for parent in sorted(parents)]
        found += [(distance, record) for record in current]
    return found


def _name(node: Metric) -> str:
    return node.name if node.operands or node.name.isidentifier() else "number"
