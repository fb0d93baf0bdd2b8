"""The contents of a run folder that a report is made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.population import Record
from search.scale import Scale


@dataclass(frozen=True)
class Run:
    """The contents of a run folder that a report is made from.

    Attributes:
        records: The journal.
        summary: Contents of `summary.json`, with every key in `SHOWN`; empty before the run ends.
        timings: The timing recorded for each candidate's evaluation, by index.
        scale: The scale of the fitness; None if it was not saved.
        environment: Versions and devices; empty if they were not recorded.
        tasks: Each task's `model`, `sparsity` and `pattern`; empty if unknown.
        objective: The objective, as in the config; empty if unknown.
        config: The resolved config as YAML; empty if there is none.
        seed: The seed of the search; None if unknown.
        ended: When the last candidate's outcome was written, ISO 8601; empty if unknown.
        apply: The command that applies the best metric; empty if there is none.
    """

    records: Sequence[Record]
    summary: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    scale: Scale | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[Mapping[str, Any]] = ()
    objective: str = ""
    config: str = ""
    seed: int | None = None
    ended: str = ""
    apply: str = ""
