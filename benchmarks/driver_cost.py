"""The driver's cost over a long search: milliseconds per candidate, memory, and time to resume.

A search on the embedded model with the extended primitives breeds, simplifies, fingerprints and
commits its candidates and writes a real run folder as always, but measures nothing: it derives each
outcome from the candidate's text. The cost of a candidate must not grow with the number of earlier
ones. Then `run_search.py` resumes the folder until a new candidate is in its journal.
"""

import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from dummies import DummyCrew, run_folder, search_with
from tables import conditions, show, write_json

from configs import schema
from search.experiment import Experiment, resolve
from search.fitness import Evaluator
from search.population import Candidate

ROOT = Path(__file__).parents[1]
WORKERS = 16
RESUME_LIMIT = 300.0
BAR_SECONDS = 20.0


@dataclass
class Meter:
    """Reads clocks and memory after every `step` candidates of a search.

    Attributes:
        readings: Candidates bred, CPU seconds, wall seconds, resident bytes.
    """

    step: int
    readings: list[tuple[int, float, float, int]] = field(default_factory=list)

    def __call__(self, candidate: Candidate) -> float:
        """Return an evaluation's seconds, which are none."""
        due = not self.readings or candidate.index - self.readings[-1][0] >= self.step
        if due:
            self.read(candidate.index - candidate.index % self.step)
        return 0.0

    def read(self, bred: int) -> None:
        """Take a reading."""
        memory = psutil.Process().memory_info().rss
        self.readings.append((bred, time.process_time(), time.perf_counter(), memory))

    def rows(self) -> list[dict[str, float]]:
        """Return, for each step, CPU and wall milliseconds per candidate, and MiB at its end."""
        return [
            {
                "candidates": end[0],
                "cpu_ms": 1000 * (end[1] - begin[1]) / (end[0] - begin[0]),
                "wall_ms": 1000 * (end[2] - begin[2]) / (end[0] - begin[0]),
                "mib": end[3] / 2**20,
            }
            for begin, end in zip(self.readings, self.readings[1:], strict=False)
        ]


def main(
    candidates: Annotated[int, typer.Option(help="Candidates to breed.")] = 20_000,
    step: Annotated[int, typer.Option(help="Candidates between two readings.")] = 1000,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to keep; default a temporary one.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table."""
    settings = [
        *("search.brood=1", "search.exploration=0"),  # the work for one child
        "pruning.group=free",
        f"search.lag={2 * WORKERS}",
        f"search.candidates={candidates}",
        *(overrides or []),
    ]
    experiment = resolve(schema.load(None, settings)).read_texts()
    with tempfile.TemporaryDirectory() as place:
        path = out or Path(place) / "run"
        meter = _search(experiment, path, candidates, step)
        resumed, resumed_cpu = _seconds_to_resume(path, candidates)
        journal = (path / "journal.jsonl").stat().st_size
    rows = meter.rows()
    figures: dict[str, Any] = {
        "by_step": rows,
        "growth_cpu": rows[-1]["cpu_ms"] / rows[0]["cpu_ms"],
        "growth_mib": rows[-1]["mib"] - rows[0]["mib"],
        "resume_seconds": resumed,
        "resume_cpu_seconds": resumed_cpu,
        "journal_mib": journal / 2**20,
    }
    _print(experiment, figures, candidates)
    write_json(json, {**conditions(experiment.config.dtype), **figures})


def _search(experiment: Experiment, path: Path, candidates: int, step: int) -> Meter:
    meter = Meter(step)
    crew = DummyCrew(Evaluator(experiment.setup), WORKERS, meter)
    with run_folder(path, experiment) as folder:
        search_with(crew, experiment, folder, WORKERS, crew.clock)
    meter.read(candidates)
    return meter


def _seconds_to_resume(path: Path, candidates: int) -> tuple[float, float]:
    """Return wall and CPU seconds from a command's start to the first new line in the journal."""
    journal = path / "journal.jsonl"
    old_size = journal.stat().st_size
    command = [sys.executable, str(ROOT / "run_search.py"), "--resume", str(path)]
    command += [f"--set=search.candidates={candidates + 1000}", "--set=ray.workers=0"]
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            while journal.stat().st_size == old_size:
                if process.poll() is not None or time.monotonic() - began > RESUME_LIMIT:
                    raise SystemExit(f"the resumed run added nothing, exit {process.poll()}")
                time.sleep(0.02)
            cpu = psutil.Process(process.pid).cpu_times()
            return time.monotonic() - began, cpu.user + cpu.system
        finally:
            process.send_signal(signal.SIGKILL)


def _print(experiment: Experiment, figures: dict[str, Any], candidates: int) -> None:
    show(
        f"the driver over {candidates} candidates, {experiment.config.model}, "
        f"lag {experiment.config.search.lag}",
        ["candidates", "CPU ms per candidate", "wall ms", "MiB"],
        [
            [
                str(row["candidates"]),
                *(f"{row[key]:.2f}" for key in ("cpu_ms", "wall_ms")),
                f"{row['mib']:.0f}",
            ]
            for row in figures["by_step"]
        ],
    )
    show(
        "the whole run",
        ["", "figure", "bar"],
        [
            ["CPU per candidate, last step over first", f"{figures['growth_cpu']:.2f}", "flat"],
            ["memory, last step minus first, MiB", f"{figures['growth_mib']:.0f}", "flat"],
            ["seconds to resume", f"{figures['resume_seconds']:.1f}", f"{BAR_SECONDS:.0f}"],
            ["CPU seconds to resume", f"{figures['resume_cpu_seconds']:.1f}", ""],
            ["journal, MiB", f"{figures['journal_mib']:.1f}", ""],
        ],
    )


if __name__ == "__main__":
    typer.run(main)
