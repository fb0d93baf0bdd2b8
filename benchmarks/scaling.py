"""How the pace grows with the number of workers, how busy they are, and what limits it.

First real workers: a search on the embedded model with 1 and 2 of them, from the command line, not
counting its start. Then dummies, whose evaluations only take time, under the real driver with
breeding, fingerprints and journal. Dummies in this process use the driver's CPU clock (see
`dummies`), so they can only lose time to the driver's work or to the search's lag. Dummies on Ray
are actors that sleep, and see this machine's other load. The number of workers that a driver can
feed is the time of an evaluation over the driver's work for it. If the lag is too small for the
longest evaluation, workers wait for its commit.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from dummies import DummyCrew, Log, outcome_of, run_folder, search_with
from rich.progress import track
from tables import conditions, show, write_json

from configs import schema
from search.experiment import Experiment, resolve
from search.fitness import Evaluator
from search.journal import RunFolder
from search.pool.cluster import Cluster, connection, ray
from search.pool.crew import Call, Event, Reply
from search.pool.on_ray import RayCrew
from search.population import Candidate

ROOT = Path(__file__).parents[1]
BAR = 0.95
LIMIT_SECONDS = 900.0
ENDLESS = 10**6
MOST_OF_EACH = 60
"""Most evaluations per worker in a case in this process."""

UNEVEN_SHARE, UNEVEN_FACTOR = 0.1, 10.0


@dataclass(frozen=True)
class Case:
    """A number of dummy workers and their work.

    Attributes:
        where: `process` or `ray`.
        seconds: Seconds per evaluation; if uneven, per short evaluation.
        uneven: Whether one evaluation in ten takes ten times as long.
        lag: The search's lag, in multiples of the workers.
    """

    where: str
    workers: int
    seconds: float
    uneven: bool = False
    lag: int = 4

    def __str__(self) -> str:
        mix = "uneven" if self.uneven else "even"
        return f"{self.where}, {self.workers} x {self.seconds:g} s, {mix}, lag {self.lag}x"

    @property
    def mean(self) -> float:
        """Mean seconds of an evaluation."""
        return self.seconds * (1 + self.uneven * UNEVEN_SHARE * (UNEVEN_FACTOR - 1))

    def virtual(self, evaluations: int) -> float | None:
        """Return the seconds that a case in this process lasts by its clock; None if on Ray."""
        per_worker = min(MOST_OF_EACH, evaluations / self.workers)
        return self.mean * per_worker if self.where == "process" else None

    def duration(self, candidate: Candidate) -> float:
        """Return the seconds of a candidate's evaluation, which are always the same."""
        long = self.uneven and random.Random(candidate.index).random() < UNEVEN_SHARE
        return self.seconds * (UNEVEN_FACTOR if long else 1)


CASES = [
    *(Case("process", workers, s) for s in (0.2, 2.0) for workers in (1, 4, 16, 64)),
    *(Case("process", 16, s, uneven=True, lag=lag) for s in (0.2, 2.0) for lag in (2, 8, 16, 32)),
    *(Case("ray", workers, s) for s in (0.2, 2.0) for workers in (4, 16)),
    *(Case("ray", 16, s, uneven=True, lag=lag) for s in (0.2, 2.0) for lag in (8, 16, 32)),
]


def main(
    real: Annotated[int, typer.Option(help="Candidates on real workers; 0 skips them.")] = 600,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, for the real workers.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of each case on Ray.")] = 45.0,
    evaluations: Annotated[
        int, typer.Option(help="Most evaluations of each case in this process.")
    ] = 1500,
    only: Annotated[str, typer.Option(help="Run only cases whose name contains this.")] = "",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print two tables."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = [f"search.candidates={real}", *(overrides or [])]
        workers = {count: _real(folder, count, real, settings) for count in (1, 2) if real}
        bench = _Bench(folder)
        cases = [case for case in CASES if only in str(case)]
        dummies = {
            str(case): bench.measure(case, case.virtual(evaluations) or seconds)
            for case in track(cases, "searching", transient=True)
        }
    _print(workers, dummies)
    figures: dict[str, Any] = {
        "candidates_per_hour": {str(count): figure["an_hour"] for count, figure in workers.items()},
        "busy_fraction": {name: dummy["busy"] for name, dummy in dummies.items()},
        "real": workers,
        "dummies": dummies,
    }
    write_json(json, {**conditions("float32"), **figures})


def _real(folder: Path, workers: int, candidates: int, settings: list[str]) -> dict[str, Any]:
    """Search with real workers; return memory, and pace and busy fraction after the first fifth."""
    out = folder / f"real{workers}"
    command = [sys.executable, str(ROOT / "run_search.py"), "--out", str(out)]
    command += [f"--set={setting}" for setting in (*settings, f"ray.workers={workers}")]
    first = candidates // 5
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            began = _wait_for(out, first, process)
            seconds = _wait_for(out, candidates, process) - began
            memory = _worker_mib(process)
        finally:
            process.terminate()
    timings = RunFolder.open_(out).read_timings()
    busy = sum(timing.get("seconds", 0.0) for i, timing in timings.items() if i >= first)
    return {
        "an_hour": 3600 * (candidates - first) / seconds,
        "busy": busy / (workers * seconds),
        "evaluation_ms": 1000
        * busy
        / sum(i >= first and "seconds" in t for i, t in timings.items()),
        "worker_mib": memory,
    }


def _worker_mib(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the MiB of each worker of a search, without shared pages."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in children if "".join(p.cmdline()).startswith("ray::_Worker")]
    return [worker.memory_full_info().uss >> 20 for worker in workers]


def _wait_for(out: Path, lines: int, process: subprocess.Popen[bytes]) -> float:
    """Wait until a journal has a number of lines, and return the time."""
    limit = time.monotonic() + LIMIT_SECONDS
    journal = out / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
        if process.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"the run in {out} did not reach {lines}, exit {process.poll()}")
        time.sleep(0.05)
    return time.monotonic()


class _Bench:
    """The embedded model with its statistics and probe, collected once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        experiment = _experiment(candidates=1, lag=0)
        self.evaluator = Evaluator(experiment.setup)
        crew = DummyCrew(self.evaluator, 1, lambda candidate: 0.0)
        with run_folder(path / "prepared", experiment) as folder:
            search_with(crew, experiment, folder, 1, crew.clock)

    def measure(self, case: Case, seconds: float) -> dict[str, float]:
        """Search with a case's workers; return the figures of workers and driver."""
        experiment = _experiment(ENDLESS, case.lag * case.workers)
        path = self.path / "run"
        with run_folder(path, experiment) as folder:
            for name in ("statistics.safetensors", "probe.safetensors"):
                shutil.copy(self.path / "prepared" / name, path)
            run = _in_process if case.where == "process" else _on_ray
            log, cpu = run(case, experiment, folder, self.evaluator, seconds)
            candidates = len(folder.read_records())
        shutil.rmtree(path)
        gaps = log.gaps
        return {
            "busy": log.busy_fraction,
            "driver_ms": 1000 * cpu / candidates,
            "feeds": case.mean * log.evaluations / cpu,
            "median_latency_ms": 1000 * median(gaps),
            "p99_latency_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
            "candidates": candidates,
        }


def _experiment(candidates: int, lag: int) -> Experiment:
    settings = [
        *("search.brood=1", "search.exploration=0"),  # the work for one child
        "pruning.group=free",
        f"search.lag={lag}",
        f"search.candidates={candidates}",
    ]
    return resolve(schema.load(None, settings)).read_texts()


def _in_process(
    case: Case, experiment: Experiment, folder: RunFolder, evaluator: Evaluator, seconds: float
) -> tuple[Log, float]:
    crew = DummyCrew(evaluator, case.workers, case.duration, seconds)
    search_with(crew, experiment, folder, case.workers, crew.clock)
    return crew.log, crew.log.cpu_seconds


def _on_ray(
    case: Case, experiment: Experiment, folder: RunFolder, evaluator: Evaluator, seconds: float
) -> tuple[Log, float]:
    # Ray is told of one core per worker, since a sleeping worker needs none.
    with connection("local", case.workers) as cluster:
        log = Log(case.workers, seconds)
        crew = SleepingCrew(cluster, experiment, evaluator.digests, case.duration, log)
        search_with(crew, experiment, folder, case.workers)
        return log, log.cpu_seconds


class _Sleeper:
    """An actor that replaces the one of `search.pool.on_ray`."""

    def start(self, digests: tuple[str, ...]) -> tuple[tuple[str, ...], float]:
        """Load nothing."""
        return digests, 0.0

    def do(self, method: str, *arguments: Any) -> tuple[None, dict[str, float]]:
        """Sleep if the call is an evaluation; return when it began and ended."""
        began = time.monotonic()
        if method == "evaluate":
            _, seconds = arguments
            time.sleep(seconds)
        return None, {"began": began, "ended": time.monotonic()}


class SleepingCrew(RayCrew):
    """Ray actors that sleep instead of evaluating."""

    def __init__(
        self,
        cluster: Cluster,
        experiment: Experiment,
        digests: tuple[str, ...],
        seconds: Callable[[Candidate], float],
        log: Log,
    ) -> None:
        super().__init__(cluster, experiment.setup, cpus=1, gpus=0, ship_model=False)
        self._actor = ray.remote(num_cpus=1)(_Sleeper)
        self._arguments = [digests]
        self.log = log
        self._seconds = seconds
        self._candidates: dict[int, Candidate] = {}

    def give(self, worker: int, call: Call) -> None:
        """Send a call; an evaluation is sent with the seconds that it takes."""
        if call.method == "evaluate":
            (candidate,) = call.arguments
            assert isinstance(candidate, Candidate)
            now = time.monotonic()
            self.log.check(now)
            self.log.doing[worker] = now
            self._candidates[worker] = candidate
            call = replace(call, arguments=(candidate, self._seconds(candidate)))
        super().give(worker, call)

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events, with an outcome for each evaluation."""
        return [self._with_outcome(event) for event in super().events(seconds)]

    def _with_outcome(self, event: Event) -> Event:
        if not isinstance(event, Reply) or event.worker not in self._candidates:
            return event
        self.log.add(event.worker, event.timing["began"], event.timing["ended"])
        return Reply(event.worker, outcome_of(self._candidates.pop(event.worker)), {})


def _print(workers: dict[int, dict[str, Any]], dummies: dict[str, dict[str, float]]) -> None:
    if workers:
        show(
            "real workers",
            ["workers", "candidates per hour", "busy", "ms per evaluation", "MiB per worker"],
            [
                [
                    str(count),
                    f"{figure['an_hour']:.0f}",
                    f"{figure['busy']:.1%}",
                    f"{figure['evaluation_ms']:.0f}",
                    ", ".join(map(str, figure["worker_mib"])),
                ]
                for count, figure in workers.items()
            ],
        )
    keys = ("driver_ms", "feeds", "median_latency_ms", "p99_latency_ms")
    show(
        f"dummies; bar for 16 uneven ones: {BAR:.0%} busy",
        ["case", "busy", "driver CPU ms per candidate", "can feed", "latency ms", "p99"],
        [
            [name, f"{dummy['busy']:.1%}", *(f"{dummy[key]:.1f}" for key in keys)]
            for name, dummy in dummies.items()
        ],
    )


if __name__ == "__main__":
    typer.run(main)
