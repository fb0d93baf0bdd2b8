"""The status of a run: on the screen, in `status.json`, and for `run_search.py --status`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from search.pool.protocol import Staff
from search.population import OUTCOMES, State
from search.scale import Scale, unit_of

RUNNING, FINISHED = "running", "finished"


@dataclass(frozen=True)
class Status:
    """The status of a run at one moment.

    Attributes:
        state: `running`, `finished`, or why it ended.
        written: Time of writing, UTC, ISO 8601.
        candidates: Number of committed candidates.
        of: Number of candidates in total.
        outcomes: Number of committed candidates, by kind of outcome.
        per_hour: Candidates per hour since this process began; 0 if not known yet.
        workers: How many are ready, busy (of the ready ones) and starting.
        faults: Number of faults of workers and calls since this process began, by kind.
        trouble: The latest fault, in one line.
        groups: Members of the population by comparison group.
        best: The fittest's metric, group, fitness and unit of fitness; None if there is none.
        seconds: Seconds since this process began to evolve.
        known: Fitness of the dense model and of the best named metric.
    """

    state: str
    written: str
    candidates: int
    of: int
    outcomes: Mapping[str, int]
    per_hour: float
    workers: Mapping[str, int]
    faults: Mapping[str, int]
    trouble: str
    groups: Mapping[str, int]
    best: Mapping[str, Any] | None
    seconds: float = 0.0
    known: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of_run(
        state: State,
        of: int,
        scale: Scale,
        outcomes: Mapping[str, int],
        seconds: float,
        per_hour: float,
        staff: Staff,
        why: str,
    ) -> "Status":
        """Return the status of a run's state."""
        best, unit = state.best, unit_of(len(scale.cells))
        named, fitness = min(scale.named_fitness.items(), key=lambda item: item[1])
        return Status(
            state=why,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            candidates=state.committed,
            of=of,
            outcomes=dict(outcomes),
            per_hour=round(per_hour, 1),
            workers={"ready": staff.ready, "busy": staff.busy, "starting": staff.starting},
            faults=dict(staff.faults),
            trouble=staff.trouble,
            groups=dict(sorted(Counter(r.criterion.group for r in state.population).items())),
            best=None
            if best is None
            else {
                "metric": best.criterion.text,
                "group": best.criterion.group,
                "fitness": best.fitness,
                "unit": unit,
            },
            seconds=round(seconds, 1),
            known={"dense": scale.dense_fitness, named: fitness},
        )

    @property
    def unit(self) -> str:
        """The unit of fitness."""
        return str((self.best or {}).get("unit", "fitness"))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `status.json`."""
        return asdict(self)

    def values(self) -> dict[str, float]:
        """Return the values for trackers, by name."""
        return {
            **{f"outcomes/{kind}": float(count) for kind, count in self.outcomes.items()},
            **{f"faults/{kind}": float(count) for kind, count in self.faults.items()},
            **{f"workers/{name}": float(count) for name, count in self.workers.items()},
            "candidates_per_hour": self.per_hour,
            **({"fitness/best": self.best["fitness"]} if self.best else {}),
        }

    def fitness_rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, fitness, metric and group of the known metrics and of the best so far."""
        known = [(name, f"{value:.4f}", "", "") for name, value in self.known.items()]
        best = self.best
        if not best:
            return [*known, ("best", "none yet", "", "")]
        return [*known, ("best", f"{best['fitness']:.4f}", best["metric"], best["group"])]

    def rows(self) -> list[tuple[str, str]]:
        """Return the course of the search, as pairs of a name and a text."""
        left = (self.of - self.candidates) / self.per_hour * 3600 if self.per_hour else None
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return [
            ("candidate", f"{self.candidates}/{self.of}"),
            ("elapsed", duration(self.seconds)),
            ("left", "-" if left is None else duration(left)),
            ("pace", f"{self.per_hour:.0f}/h"),
            ("population", _counts(self.groups) or "none"),
            ("outcomes", ", ".join(f"{self.outcomes.get(k, 0)} {k}" for k in OUTCOMES)),
            ("workers", _counts(self.workers)),
            *([("faults", f"{faults}; the last: {self.trouble}")] if faults else []),
        ]


NEEDED = tuple(
    item.name
    for item in fields(Status)
    if item.default is MISSING and item.default_factory is MISSING
)
"""Keys that `status.json` must have."""


def duration(seconds: float) -> str:
    """Return a readable duration: 45 s, 12 min 30 s, 3 h 20 min, 2 d 5 h."""
    total = round(seconds)
    for large, small, unit, subunit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if total >= unit:
            return f"{total // unit} {large} {total % unit // subunit} {small}"
    return f"{total // 60} min {total % 60} s" if total >= 60 else f"{total} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
