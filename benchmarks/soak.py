"""A search under fire: workers killed and stopped, nodes lost and added, the driver killed.

A search of the embedded model by `run_search.py` on a Ray cluster of three nodes with four CPU
workers, all on this machine. Every few seconds a fault is chosen by a seed and made for real; a
driver that is gone is started again with `--resume`. At the end the journal must be, byte for byte,
that of the same search with one worker and in peace. Texts are small, so that thousands of
candidates take minutes.
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
"""Seconds more that a fault waits for a commit: where workers take longer to start than live, a
search never ends."""

SMALL = [
    *("calibration.windows=4", "calibration.length=64", "fitness.windows=4", "fitness.length=64"),
    *("selection.windows=4", "selection.length=64", "report.windows=4", "report.length=64"),
    *("search.stages=[1, 2]", "search.lag=16", "search.primitives=extended"),
    *("search.population=16", "search.checkpoint_every=25", "ray.wait_seconds=120"),
]
END_SECONDS = 60.0
"""What workers have, once the driver is done, to be gone, too."""


def main(
    candidates: Annotated[int, typer.Option(help="Of the search.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the search and of the faults.")] = 0,
    pause: Annotated[float, typer.Option(help="Seconds between two faults, in the mean.")] = 4.0,
    minutes: Annotated[float, typer.Option(help="After which the search has failed.")] = 90.0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exits 1 if the search did not end, or not as in peace."""
    _end_by_sigterm()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        figures = soak(Path(place), candidates, seed, pause, 60 * minutes)
    _print(figures, candidates)
    write_json(json, {**conditions("float32"), **figures})
    raise typer.Exit(0 if figures["journal_identical"] else 1)


def soak(place: Path, candidates: int, seed: int, pause: float, limit: float) -> dict[str, Any]:
    """Search under fire and in peace, in a folder with a short path; return the figures."""
    settings = [*SMALL, f"search.seed={seed}", f"search.candidates={candidates}"]
    began = time.monotonic()
    _in_peace(place, settings, limit)
    quiet_seconds = time.monotonic() - began
    began = time.monotonic()
    with cluster(place / "ray", ROOT) as nodes:
        _end_by_sigterm()  # once more: Ray took it for itself
        driver = _driver(place, [*settings, f"ray.address={nodes.address}", "ray.workers=4"])
        killer = Killer(nodes, driver, random.Random(seed))
        exits = _under_fire(killer, pause, time.monotonic() + limit)
        seconds = time.monotonic() - began
        left = nodes.left(END_SECONDS)
    fired, quiet = (place / name / "journal.jsonl" for name in ("fired", "quiet"))
    calls = (place / "calls").read_text(encoding="ascii").splitlines()
    return {
        "faults": dict(killer.faults),
        "lost": candidates - driver.committed,
        "repeated": _again(calls, "done"),
        "begun_again": _again(calls, "given"),
        "journal_identical": fired.read_bytes() == quiet.read_bytes(),
        "exits": exits,
        "workers_left": left,
        "seconds": round(seconds, 1),
        "quiet_seconds": round(quiet_seconds, 1),
    }


def _end_by_sigterm() -> None:
    """Let SIGTERM end this process in order, so that nothing of it stays."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _in_peace(place: Path, settings: list[str], limit: float) -> None:
    config = place / "quiet.yaml"
    config.write_text(schema.to_yaml(schema.load(None, [*settings, "ray.workers=1"])))
    command = [sys.executable, str(ROOT / "run_search.py"), "--config", str(config)]
    command += ["--out", str(place / "quiet")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise SystemExit(f"the quiet run exits {done.returncode}: {done.stdout}{done.stderr}")


def _driver(place: Path, settings: list[str]) -> Driver:
    config, out = place / "fired.yaml", place / "fired"
    config.write_text(schema.to_yaml(schema.load(None, settings)))
    script = [sys.executable, str(ROOT / "benchmarks" / "counted_search.py"), str(place / "calls")]
    begin = [*script, "--config", str(config), "--out", str(out)]
    return Driver(begin, [*script, "--resume", str(out)], out, place / "fired.log")


def _under_fire(killer: Killer, pause: float, limit: float) -> dict[str, int]:
    """Make faults until the search is done; return how often it ended with which code."""
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
            grown = driver.committed > committed
            if time.monotonic() > due + PATIENCE * (not grown):
                killer.strike()
                due, committed = time.monotonic() + killer.rng.uniform(*pauses), driver.committed
            time.sleep(0.1)
    finally:
        driver.kill()
    return dict(codes)


def _again(calls: list[str], what: str) -> int:
    """Return how many calls there were beyond the first for each candidate."""
    counts = Counter(line for line in calls if line.startswith(what))
    return counts.total() - len(counts)


def _print(figures: dict[str, Any], candidates: int) -> None:
    faults = sorted(figures["faults"].items())
    show(
        f"{candidates} candidates under fire, the embedded model, 4 workers on 3 nodes",
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
            ["seconds in peace", f"{figures['quiet_seconds']:.0f}", ""],
        ],
    )


if __name__ == "__main__":
    typer.run(main)
