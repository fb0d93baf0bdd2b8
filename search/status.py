"""Where a run stands: on the screen, in `status.json`, and for `run_search.py --status`."""

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
    """Where a run stands at one moment.

    Attributes:
        state: `running`, `finished`, or why it ended.
        written: When, UTC, ISO 8601.
        candidates: How many are committed.
        of: How many will be.
        outcomes: Of those that are committed, by kind.
        per_hour: Candidates an hour since this process began; 0 if that is not known yet.
        workers: How many are ready, busy (of these) and starting.
        faults: What went wrong with workers and calls since this process began, by kind.
        trouble: The last of it, in one line.
        groups: Members of the population by comparison group.
        best: Metric, group, fitness and its unit of the fittest; None if there is none.
        seconds: Since this process began to evolve.
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
        named, fitness = min(scale.named_fitness.items(), key=lambda one: one[1])
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
        """What a fitness is in."""
        return str((self.best or {}).get("unit", "fitness"))

    def to_dict(self) -> dict[str, Any]:
        """Return what `status.json` holds."""
        return asdict(self)

    def values(self) -> dict[str, float]:
        """Return what a tracker draws, by name."""
        return {
            **{f"outcomes/{kind}": float(count) for kind, count in self.outcomes.items()},
            **{f"faults/{kind}": float(count) for kind, count in self.faults.items()},
            **{f"workers/{name}": float(count) for name, count in self.workers.items()},
            "candidates_per_hour": self.per_hour,
            **({"fitness/best": self.best["fitness"]} if self.best else {}),
        }

    def fitness_rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, fitness, metric and group of what is known and of the best so far."""
        known = [(name, f"{value:.4f}", "", "") for name, value in self.known.items()]
        best = self.best
        if not best:
            return [*known, ("best", "none yet", "", "")]
        return [*known, ("best", f"{best['fitness']:.4f}", best["metric"], best["group"])]

    def rows(self) -> list[tuple[str, str]]:
        """Return how the search goes, as pairs of a name and a text."""
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
    one.name for one in fields(Status) if one.default is MISSING and one.default_factory is MISSING
)
"""Keys that `status.json` must have."""


def duration(seconds: float) -> str:
    """Return a time as a person says it: 45 s, 12 min 30 s, 3 h 20 min, 2 d 5 h."""
    left = round(seconds)
    for large, small, unit, of in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if left >= unit:
            return f"{left // unit} {large} {left % unit // of} {small}"
    return f"{left // 60} min {left % 60} s" if left >= 60 else f"{left} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
