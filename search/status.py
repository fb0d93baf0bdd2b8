"""The status of a run at one moment: in `status.json`, below the bar and for trackers."""

from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from prunevolve.search.population import OUTCOMES
from prunevolve.search.run_folder import RunFolder

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
    best: BestSoFar | None
    known: dict[str, float]

    def values(self) -> dict[str, float]:
        """Return the values for trackers, by name."""
        counts = {"outcomes": self.outcomes, "faults": self.faults, "workers": self.workers}
        values = {f"{of}/{name}": float(n) for of in counts for name, n in counts[of].items()}
        values["candidates_per_hour"] = self.per_hour
        if self.best:
            values["fitness/best"] = self.best.fitness
        return values

    def lines(self) -> list[str]:
        """Return all but how far the search is, as lines for a person."""
        known = ", ".join(f"{name} {fitness:.4f}" for name, fitness in self.known.items())
        lines = [f"fitness: {known}, best none yet"]
        if best := self.best:
            lines = [
                f"fitness: {known}, best {best.fitness:.4f} {best.unit}",
                f"best: {best.metric}, group {best.group}",
            ]
        outcomes = {kind: self.outcomes.get(kind, 0) for kind in OUTCOMES}
        lines.append(f"outcomes: {_counts(outcomes)}")
        lines.append(f"workers: {_counts(self.workers)}; {self.per_hour:.0f} candidates an hour")
        if self.faults:
            lines.append(f"faults: {_counts(self.faults)}; the last: {self.trouble}")
        return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def print_status(folder: RunFolder, console: Console) -> None:
    """Print the status of a run, while it is running or afterwards."""
    status = folder.read_model("status.json", Status)
    far = f"candidates: {status.candidates}/{status.of}"
    if status.state == RUNNING and status.per_hour:
        hours = (status.of - status.candidates) / status.per_hour
        far += f", {timedelta(seconds=round(hours * 3600))} left"
    for line in (f"{folder.path}: {status.state}, as of {status.written}", far, *status.lines()):
        console.print(line, soft_wrap=True)
