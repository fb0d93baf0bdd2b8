"""The files of a run folder, read: all that a report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search.population import Record
from search.scale import Scale


@dataclass(frozen=True)
class Run:
    """What a report is made of: the files of a run folder, read.

    Attributes:
        records: The journal.
        summary: What `summary.json` holds, with every key in `SHOWN`; empty before the run's end.
        timings: What was noted of each candidate's evaluation, by index.
        scale: What a fitness is in; None if it was not kept.
        environment: Versions and devices; empty if they were not noted.
        tasks: Of each task `model`, `sparsity` and `pattern`; empty if they are not known.
        objective: What a loss is, as in the config; empty if it is not known.
        config: The resolved config as YAML; empty if it is not there.
        seed: The search's; None if it is not known.
        ended: When the last candidate's outcome was written, ISO 8601; empty if it is not known.
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
