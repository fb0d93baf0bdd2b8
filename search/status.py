"""Where a run stands: on the screen, in `status.json`, and for `run_search.py --status`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from search.pool.protocol import Staff
from search.population import OUTCOMES, State

RUNNING = "running"


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

    @staticmethod
    def of_run(
        state: State,
        of: int,
        unit: str,
        outcomes: Mapping[str, int],
        per_hour: float,
        staff: Staff,
        why: str,
    ) -> "Status":
        """Return the status of a run's state."""
        best = state.best
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
        )

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

    def rows(self) -> list[tuple[str, str]]:
        """Return what a person reads, as pairs of a name and a text."""
        left = (self.of - self.candidates) / self.per_hour * 60 if self.per_hour else None
        best = self.best
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return [
            ("candidate", f"{self.candidates}/{self.of}"),
            ("best", f"{best['metric']} ({best['group']})" if best else "none yet"),
            ("fitness", f"{best['fitness']:.4f} {best['unit']}" if best else "-"),
            ("population", _counts(self.groups) or "none"),
            ("pace", f"{self.per_hour:.0f}/h"),
            ("left", "-" if left is None else f"{left:.0f} min"),
            ("outcomes", ", ".join(f"{self.outcomes.get(k, 0)} {k}" for k in OUTCOMES)),
            ("workers", _counts(self.workers)),
            *([("faults", f"{faults}; the last: {self.trouble}")] if faults else []),
        ]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
