"""A search's history, from its journal: pace, outcomes, operators in use, lines of descent."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from pruning.metric import Metric
from search.population import OUTCOMES, Record


def elapsed_seconds(count: int, timings: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """Estimate when each candidate's outcome arrived, in seconds of a search without pauses.

    The estimate is the time that the workers spent on this and all earlier candidates, divided by
    the number of workers: it ignores idle time, stops and resumes.
    """
    workers = {timing["worker"] for timing in timings.values() if "worker" in timing}
    busy = (timings.get(index, {}).get("seconds", 0.0) for index in range(count))
    return [total / max(1, len(workers)) for total in accumulate(busy)]


def bins(count: int, most: int = 24) -> list[range]:
    """Split the candidates 0 .. count - 1 into at most `most` ranges of equal width."""
    width = max(1, -(-count // most))
    return [range(start, min(start + width, count)) for start in range(0, count, width)]


def outcomes_by_bin(records: Sequence[Record], spans: Sequence[range]) -> dict[str, list[int]]:
    """Return the number of each kind of outcome in each span, without kinds that never occur."""
    counts = [Counter(records[index].outcome.kind for index in span) for span in spans]
    rows = {kind: [count[kind] for count in counts] for kind in OUTCOMES}
    return {kind: row for kind, row in rows.items() if any(row)}


def shares_by_bin(
    records: Sequence[Record], spans: Sequence[range]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return leaves and operators, each with the share of each span's metrics that contain it.

    Every bred metric counts, whatever its outcome. All numbers count as one leaf. The most frequent
    comes first.
    """
    contents = [{(bool(n.operands), _name(n)) for n in r.criterion.metric.nodes()} for r in records]
    totals = Counter(symbol for symbols in contents for symbol in symbols)
    leaves, operators = (
        {
            symbol[1]: [
                sum(symbol in contents[index] for index in span) / len(span) for span in spans
            ]
            for symbol, _ in totals.most_common()
            if symbol[0] == is_operator
        }
        for is_operator in (False, True)
    )
    return leaves, operators


def ancestry(records: Sequence[Record], start: Record) -> list[tuple[int, Record]]:
    """Return a record and all its ancestors with their distance, nearest first, each once."""
    ancestors, known, generation, distance = [(0, start)], {start.index}, [start], 0
    while generation:
        distance += 1
        parents = {parent for record in generation for parent in record.candidate.parents} - known
        known |= parents
        generation = [records[parent] for parent in sorted(parents)]
        ancestors += [(distance, record) for record in generation]
    return ancestors


def _name(node: Metric) -> str:
    return node.name if node.operands or node.name.isidentifier() else "number"
