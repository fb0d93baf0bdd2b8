"""The status of a run: on the screen, in `status.json`, and for `run_search.py --status`."""

from collections.abc import Mapping
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

from search.population import OUTCOMES

RUNNING, FINISHED = "running", "finished"


class BestSoFar(BaseModel):
    """The fittest metric so far."""

    metric: str
    group: str
    fitness: float
    unit: str


class Status(BaseModel):
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
        seconds: Seconds since this process began to evolve.
        known: Fitness of the dense model and of the best named metric.
    """

    model_config = ConfigDict(frozen=True)

    state: str
    written: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    candidates: int
    of: int
    outcomes: dict[str, int]
    per_hour: float
    workers: dict[str, int]
    faults: dict[str, int]
    trouble: str
    groups: dict[str, int]
    best: BestSoFar | None
    seconds: float
    known: dict[str, float]

    def values(self) -> dict[str, float]:
        """Return the values for trackers, by name."""
        counts = {"outcomes": self.outcomes, "faults": self.faults, "workers": self.workers}
        values = {f"{of}/{name}": float(n) for of in counts for name, n in counts[of].items()}
        values["candidates_per_hour"] = self.per_hour
        if self.best:
            values["fitness/best"] = self.best.fitness
        return values

    @property
    def unit(self) -> str:
        """The unit of fitness."""
        return self.best.unit if self.best else "fitness"

    def fitness_rows(self) -> list[tuple[str, str, str, str]]:
        """Return name, fitness, metric and group of the known metrics and of the best so far."""
        rows = [(name, f"{value:.4f}", "", "") for name, value in self.known.items()]
        best = self.best
        if not best:
            return [*rows, ("best", "none yet", "", "")]
        return [*rows, ("best", f"{best.fitness:.4f}", best.metric, best.group)]

    def rows(self) -> list[tuple[str, str]]:
        """Return the course of the search, as pairs of a name and a text."""
        left = (self.of - self.candidates) / self.per_hour * 3600 if self.per_hour else None
        rows = [
            ("candidate", f"{self.candidates}/{self.of}"),
            ("elapsed", duration(self.seconds)),
            ("left", "-" if left is None else duration(left)),
            ("pace", f"{self.per_hour:.0f}/h"),
            ("population", _counts(self.groups) or "none"),
            ("outcomes", _counts({kind: self.outcomes.get(kind, 0) for kind in OUTCOMES})),
            ("workers", _counts(self.workers)),
        ]
        if self.faults:
            faults = _counts(dict(sorted(self.faults.items())))
            rows.append(("faults", f"{faults}; the last: {self.trouble}"))
        return rows


def duration(seconds: float) -> str:
    """Return a readable duration: 45 s, 12 min 30 s, 3 h 20 min, 2 d 5 h."""
    total = round(seconds)
    for large, small, unit, subunit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if total >= unit:
            return f"{total // unit} {large} {total % unit // subunit} {small}"
    return f"{total // 60} min {total % 60} s" if total >= 60 else f"{total} s"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
