"""A search under faults: workers killed and stopped, nodes lost and added, the driver killed.

`run_search.py` searches on the embedded model on a Ray cluster of three nodes with four CPU
workers, all on this machine. Every few seconds a seeded choice of fault is made for real; a dead
driver is started again with `--resume`. At the end the journal must equal, byte for byte, that of
the same search with one worker and no faults. Texts are small, so that thousands of candidates take
minutes.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from faults import Driver, Killer, cluster
from tables import conditions, show, write_json

from configs import schema

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0
"""Extra seconds that a fault waits for a commit: if workers died faster than they start, the search
would never end."""

SMALL = [
    *("calibration.windows=4", "calibration.length=64", "fitness.windows=4", "fitness.length=64"),
    *("selection.windows=4", "selection.length=64", "report.windows=4", "report.length=64"),
    *("search.stages=[1, 2]", "search.lag=16", "search.brood=2"),
    *("search.population=16", "search.checkpoint_every=25", "ray.wait_seconds=120"),
]
END_SECONDS = 60.0
"""Seconds in which workers must be gone after the driver ends."""


def main(
    candidates: Annotated[int, typer.Option(help="Candidates of the search.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the faults.")] = 0,
    pause: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 4.0,
    minutes: Annotated[
        float, typer.Option(help="Minutes after which the search has failed.")
    ] = 90.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exits 1 if the journal differs from that of the undisturbed search."""
    _exit_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        figures = soak(Path(folder), candidates, seed, pause, 60 * minutes)
    _print(figures, candidates)
    write_json(json, {**conditions("float32"), **figures})
    raise typer.Exit(0 if figures["journal_identical"] else 1)


def soak(folder: Path, candidates: int, seed: int, pause: float, limit: float) -> dict[str, Any]:
    """Search with and without faults, in a folder with a short path; return the figures."""
    settings = [*SMALL, f"search.seed={seed}", f"search.candidates={candidates}"]
    began = time.monotonic()
    _search_undisturbed(folder, settings, limit)
    quiet_seconds = time.monotonic() - began
    began = time.monotonic()
    with cluster(folder / "ray", ROOT) as nodes:
        _exit_on_sigterm()  # again, because Ray replaced the handler
        driver = _driver(folder, [*settings, f"ray.address={nodes.address}", "ray.workers=4"])
        killer = Killer(nodes, driver, random.Random(seed))
        exits = _search_under_faults(killer, pause, time.monotonic() + limit)
        seconds = time.monotonic() - began
        left = nodes.left(END_SECONDS)
    fired, quiet = (folder / name / "journal.jsonl" for name in ("fired", "quiet"))
    calls = (folder / "calls").read_text(encoding="ascii").splitlines()
    return {
        "faults": dict(killer.faults),
        "lost": candidates - driver.committed,
        "repeated": _repeats(calls, "done"),
        "begun_again": _repeats(calls, "given"),
        "journal_identical": fired.read_bytes() == quiet.read_bytes(),
        "exits": exits,
        "workers_left": left,
        "seconds": round(seconds, 1),
        "quiet_seconds": round(quiet_seconds, 1),
    }


def _exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit, so that everything is cleaned up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _search_undisturbed(folder: Path, settings: list[str], limit: float) -> None:
    config = folder / "quiet.yaml"
    config.write_text(schema.to_yaml(schema.load(None, [*settings, "ray.workers=1"])))
    command = [sys.executable, str(ROOT / "run_search.py"), "--config", str(config)]
    command += ["--out", str(folder / "quiet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise SystemExit(f"the quiet run exits {done.returncode}: {done.stdout}{done.stderr}")


def _driver(folder: Path, settings: list[str]) -> Driver:
    config, out = folder / "fired.yaml", folder / "fired"
    config.write_text(schema.to_yaml(schema.load(None, settings)))
    script = [sys.executable, str(ROOT / "benchmarks" / "counted_search.py"), str(folder / "calls")]
    begin = [*script, "--config", str(config), "--out", str(out)]
    return Driver(begin, [*script, "--resume", str(out)], out, folder / "fired.log")


def _search_under_faults(killer: Killer, pause: float, limit: float) -> dict[str, int]:
    """Make faults until the search is done; return the driver's exit codes and their counts."""
    driver, codes = killer.driver, Counter[str]()
    pauses = pause / 2, pause * 1.5
    driver.start()
    try:
        due, committed = time.monotonic() + killer.rng.uniform(*pauses), 0
        while (code := driver.code()) != 0:
            if code is not None:
                codes[str(code)] += 1
                if code not in (3, -9):
                    raise SystemExit(f"the search exits {code}: {driver.log.read_text()[-2000:]}")
                driver.start()
            if time.monotonic() > limit:
                raise SystemExit(f"only {driver.committed} candidates when time was up")
            progress = driver.committed > committed
            if time.monotonic() > due + PATIENCE * (not progress):
                killer.strike()
                due, committed = time.monotonic() + killer.rng.uniform(*pauses), driver.committed
            time.sleep(0.1)
    finally:
        driver.kill()
    return dict(codes)


def _repeats(calls: list[str], event: str) -> int:
    """Return how many calls there were beyond the first for each candidate."""
    counts = Counter(line for line in calls if line.startswith(event))
    return counts.total() - len(counts)


def _print(figures: dict[str, Any], candidates: int) -> None:
    faults = sorted(figures["faults"].items())
    show(
        f"{candidates} candidates under faults, the embedded model, 4 workers on 3 nodes",
        ["", "figure", "bar"],
        [
            *([f"fault: {kind}", str(count), ""] for kind, count in faults),
            ["candidates lost", str(figures["lost"]), "0"],
            ["evaluations done more than once", str(figures["repeated"]), ""],
            ["evaluations begun more than once", str(figures["begun_again"]), ""],
            ["journal identical", str(figures["journal_identical"]), "True"],
            ["workers left behind", str(figures["workers_left"]), "0"],
            ["exits of the driver", str(figures["exits"]), "3 or -9"],
            ["seconds", f"{figures['seconds']:.0f}", ""],
            ["seconds without faults", f"{figures['quiet_seconds']:.0f}", ""],
        ],
    )


if __name__ == "__main__":
    typer.run(main)
