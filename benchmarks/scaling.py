"""How the pace grows with the number of workers, how busy they are, and what limits it.

First real workers: a search on the embedded model with 1 and 2 of them, not counting its start.
Then workers that only sleep, under the real program with broods, fingerprints and journal: up to 16
on Ray, and up to 1,024 as entries in a list of the driver. The number of workers that a driver can
feed is the time of an evaluation over the driver's work for it. If the lag is too small for the
longest evaluation, workers wait for its commit.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer
from real_run import workers_among
from rich.progress import track
from tables import ROOT, conditions, show_cases, write_json
from watched_search import UNEVEN_FACTOR, UNEVEN_SHARE

BAR = 0.95
LIMIT_SECONDS = 1800.0
LAG = 16
"""The lag for each worker, as docs/CLUSTER.md says."""

Span = tuple[float, float]
"""Start and end of an evaluation."""


@dataclass(frozen=True)
class Case:
    """A number of sleeping workers and their work.

    Attributes:
        seconds: Seconds per evaluation; if uneven, per short evaluation.
        uneven: Whether one evaluation in ten takes ten times as long.
        on_ray: Whether the workers are processes of Ray.
    """

    workers: int
    seconds: float
    uneven: bool
    on_ray: bool = False

    def __str__(self) -> str:
        mix = "uneven" if self.uneven else "even"
        return f"{'ray, ' * self.on_ray}{self.workers} x {self.seconds:g} s, {mix}"

    @property
    def lag(self) -> int:
        """The search's lag."""
        return LAG * self.workers

    @property
    def mean(self) -> float:
        """Mean seconds of an evaluation."""
        return self.seconds * (1 + self.uneven * UNEVEN_SHARE * (UNEVEN_FACTOR - 1))


SIZES = ((16, 2.0), (64, 2.0), (256, 5.0), (1024, 20.0))
CASES = [
    *(Case(16, 2.0, uneven, on_ray=True) for uneven in (False, True)),
    *(Case(*size, uneven) for size in SIZES for uneven in (False, True)),
]


def main(
    real: Annotated[int, typer.Option(help="Candidates on real workers; 0 skips them.")] = 600,
    seconds: Annotated[float, typer.Option(help="Seconds of each case.")] = 45.0,
    only: Annotated[str, typer.Option(help="Run only cases whose name contains this.")] = "",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print two tables."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workers = {n: _real(folder / f"real{n}", n, real) for n in (1, 2) if real}
        cases = [case for case in CASES if only in str(case)]
        sleeping = {
            str(case): _sleeping(case, folder / str(number), seconds)
            for number, case in enumerate(track(cases, "searching", transient=True))
        }
    if workers:
        show_cases("real workers", {f"{count} workers": case for count, case in workers.items()})
    show_cases(f"workers that sleep, lag {LAG} for each; bar: {BAR:.0%} busy", sleeping)
    figures = {
        "candidates_per_hour": {str(count): figure["an_hour"] for count, figure in workers.items()},
        "busy_fraction": {name: figure["busy"] for name, figure in sleeping.items()},
        "real": workers,
        "dummies": sleeping,
        "cases": [{**vars(case), "lag": case.lag, **sleeping[str(case)]} for case in cases],
    }
    write_json(json, {**conditions("float32"), **figures})


@contextmanager
def _running(out: Path, pace: str, settings: list[str]) -> Iterator[psutil.Process]:
    """Run a search on Ray whose workers write to a log beside its folder; end it on exit."""
    script = str(ROOT / "benchmarks" / "watched_search.py")
    command = [sys.executable, script, str(out.with_suffix(".log")), pace, "--out", str(out)]
    command += [f"--set={setting}" for setting in settings]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _wait_until(done: Callable[[], bool], search: psutil.Process) -> float:
    """Wait for something that a search does, and return the time."""
    limit = time.monotonic() + LIMIT_SECONDS
    while not done():
        if search.status() == psutil.STATUS_ZOMBIE or time.monotonic() > limit:
            raise SystemExit("a search ended too early or does not get on")
        time.sleep(0.5)
    return time.monotonic()


def _committed(out: Path) -> int:
    journal = out / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _real(out: Path, workers: int, candidates: int) -> dict[str, Any]:
    """Search with real workers; return memory, and pace and busy fraction after the first fifth."""
    first = candidates // 5
    settings = [f"search.candidates={candidates}", f"ray.workers={workers}"]
    with _running(out, "0", settings) as search:
        began = _wait_until(lambda: _committed(out) >= first, search)
        ended = _wait_until(lambda: _committed(out) >= candidates, search)
        children = workers_among(search.children(recursive=True))
        memory = [worker.memory_full_info().uss >> 20 for worker in children]
    spans = [span for worker in _spans(out).values() for span in worker]
    times = [end - start for start, end in spans if began <= start < ended]
    return {
        "an_hour": 3600 * (candidates - first) / (ended - began),
        "busy": sum(times) / (workers * (ended - began)),
        "evaluation_ms": 1000 * sum(times) / len(times),
        "worker_mib": memory,
    }


def _sleeping(case: Case, out: Path, seconds: float) -> dict[str, float]:
    """Search with workers that sleep, and measure for some seconds once children have parents."""
    settings = [
        f"search.lag={case.lag}",
        # With more workers than cores Ray is told of as many cores: a sleeping worker needs none.
        *("search.candidates=1000000", f"ray.workers={case.workers}"),
    ]
    if not case.on_ray:
        settings.append("ray.address=auto")  # dummies take no memory of this machine
    pace = f"{case.seconds}{'u' * case.uneven}{'d' * (not case.on_ray)}"
    with _running(out, pace, settings) as search:
        # From then on children have parents.
        began = _wait_until(lambda: _committed(out) > case.lag, search)
        before, committed = search.cpu_times(), _committed(out)
        time.sleep(seconds)
        after, candidates = search.cpu_times(), _committed(out) - committed
        ended = time.monotonic()
    cpu = after.user + after.system - before.user - before.system
    spans = _spans(out)
    inside = [
        (max(start, began), min(end, ended))
        for worker in spans.values()
        for start, end in worker
        if start < ended and end > began
    ]
    gaps = sorted(
        later[0] - earlier[1]
        for worker in spans.values()
        for earlier, later in pairwise(worker)
        if began <= earlier[1] < ended
    )
    return {
        "busy": sum(end - start for start, end in inside) / (case.workers * (ended - began)),
        "driver_ms": 1000 * cpu / candidates,
        "feeds": case.mean * len(inside) / cpu,
        "median_latency_ms": 1000 * median(gaps),
        "p99_latency_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
        "candidates": candidates,
    }


def _spans(out: Path) -> dict[int, list[Span]]:
    """Return the evaluations in a search's log by worker; one that has not ended ends later."""
    log = out.with_suffix(".log")
    spans: dict[int, list[Span]] = {}
    for line in log.read_text(encoding="ascii").splitlines() if log.exists() else ():
        event, _, process, moment = line.split()
        of_worker = spans.setdefault(int(process), [])
        if event == "done":
            start, _ = of_worker.pop()
            of_worker.append((start, float(moment)))
        else:
            of_worker.append((float(moment), float("inf")))
    return spans


if __name__ == "__main__":
    typer.run(main)
