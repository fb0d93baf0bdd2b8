"""The contribution of each part of the search, for the same time or candidates and several seeds.

It compares evolution with random search, and with evolution by other settings, such as without
broods, products, crowding or units. All start without seed metrics, in
this process, on the same statistics. It reports the best fitness at the end, and the time or the
candidates to reach the fitness of named metrics.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from real_run import RealRun
from rich.progress import track
from tables import ROOT, conditions, show, write_json

from configs import schema
from pruning.baselines import NAMED
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Fingerprints
from search.fitness import Evaluator
from search.population import Candidate, State

VARIANTS: dict[str, list[str]] = {
    "evolution": [],
    "random search": [
        *("search.crossover=0", "search.mutation=0", "search.brood=1"),
    ],
    "no broods": ["search.brood=1"],
    "broods of 16": ["search.brood=16"],
    "no products": ["search.products=0"],
    "half products": ["search.products=0.5"],
    "exchange": ["search.exchange=1"],
    "no crowding": ["search.crowding=0"],
    "deeper trees": ["search.initial_depth=[2,4]"],
    "units": ["search.units=off"],
    "no units": ["search.units=required"],
    "no stages": ["search.stages=[]"],
}
"""Overrides of the config, by variant."""

NOTHING_EVALUATED = 5
"""Exit code of a search whose only candidate was not evaluated to the end."""

TARGETS = ("wanda", "snip", "directed-snip-wanda")
"""Named metrics, each in its own group, whose fitness is to be reached."""

Limit = tuple[float, str]
"""Where a search ends, in `s` of CPU time or in `candidates`."""


@dataclass(frozen=True)
class Trace:
    """One search: best fitness, candidates, full evaluations, and the way to each target."""

    best: float
    candidates: int
    evaluated: int
    reached: dict[str, float | None]


def main(
    config: Annotated[str | None, typer.Option(help="Experiment; none: the embedded one.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder in place of a config: its statistics, too.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Some of them, by commas; none: all.")] = "",
    seconds: Annotated[float, typer.Option(help="Busy time of each search.")] = 60.0,
    candidates: Annotated[
        int | None, typer.Option(help="Candidates of each search, in place of a time.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Searches of each kind.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    limit: Limit = (candidates, "candidates") if candidates else (seconds, "s")
    base = ["search.seeds=[]", *(overrides or [])]
    tried = {name: VARIANTS[name] for name in variants.split(",")} if variants else VARIANTS
    with tempfile.TemporaryDirectory() as temporary:
        run = run or _prepared(config, base, Path(temporary) / "run")
        base.append("search.candidates=1000000")
        real = RealRun(run, base)
        evaluator = real.evaluator(real.experiment.setup)
        outcomes = {n: evaluator.evaluate(Candidate(0, NAMED[n].criterion)) for n in TARGETS}
        targets = {name: outcome.fitness or math.nan for name, outcome in outcomes.items()}
        traces: dict[str, list[Trace]] = {variant: [] for variant in tried}
        # Seeds in the outer loop, so that a slowdown of the machine affects all variants.
        searches = [(seed, variant) for seed in range(seeds) for variant in tried]
        for seed, variant in track(searches, "searching", transient=True):
            settings = [*base, f"search.seed={seed}", *tried[variant]]
            changed = resolve(schema.load(run / "config.yaml", settings))
            there = changed.with_windows(real.experiment.windows)
            traces[variant].append(_search(evaluator, real.fingerprints, there, limit, targets))
    _print(real.experiment, traces, targets, limit)
    runs = {name: [vars(trace) for trace in of_variant] for name, of_variant in traces.items()}
    figures = {"limit": f"{limit[0]:.0f} {limit[1]}", "targets": targets, "runs": runs}
    write_json(json, {**conditions(real.experiment.config.dtype), **figures})


def _prepared(config: str | None, settings: list[str], out: Path) -> Path:
    """Make a run of one candidate, for its statistics, probe and scale; return its folder."""
    command = [sys.executable, str(ROOT / "run_search.py"), "--out", str(out)]
    command += ["--config", config] if config else []
    command += [f"--set={s}" for s in (*settings, "search.candidates=1", "ray.workers=0")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, NOTHING_EVALUATED):
        raise SystemExit(done.stdout + done.stderr)
    return out


def _search(
    evaluator: Evaluator,
    fingerprints: Fingerprints,
    experiment: Experiment,
    limit: Limit,
    targets: Mapping[str, float],
) -> Trace:
    """Search until the limit."""
    evaluator.setup = experiment.setup
    marks = Fingerprints(fingerprints.tasks)  # a copy that has seen no masks
    evolution = Evolution(experiment.breeder, experiment.weights, marks, State())
    # CPU time of this process, which runs on one thread: other load does not count.
    began, evaluated = time.process_time(), 0
    reached: dict[str, float | None] = dict.fromkeys(targets)
    # Each outcome is told at once, so that the next candidate can be bred.
    for candidate in evolution.ask():
        outcome = candidate.decided or evaluator.evaluate(candidate)
        evolution.tell(candidate.index, outcome)
        evaluated += outcome.kind == "evaluated"
        passed, best = time.process_time() - began, evolution.state.best
        spent = passed if limit[1] == "s" else evolution.state.committed
        for name, fitness in targets.items():
            if reached[name] is None and best and best.rank[0] <= fitness:
                reached[name] = spent
        if spent >= limit[0]:
            break
    fitness = evolution.state.best.rank[0] if evolution.state.best else math.inf
    return Trace(fitness, evolution.state.committed, evaluated, reached)


def _print(
    experiment: Experiment,
    traces: Mapping[str, list[Trace]],
    targets: Mapping[str, float],
    limit: Limit,
) -> None:
    rows = []
    for variant, runs in traces.items():
        best = [run.best for run in runs]
        row = [variant, f"{statistics.median(best):.4f}", f"{max(best) - min(best):.4f}"]
        row += [f"{statistics.median([run.candidates for run in runs]):.0f}"]
        row += [f"{statistics.median([run.evaluated for run in runs]):.0f}"]
        for name in targets:
            spent = [math.inf if (s := run.reached[name]) is None else s for run in runs]
            median = statistics.median(spent)
            text = f"{median:.0f} {limit[1]}" if math.isfinite(median) else "not"
            row.append(f"{text} ({sum(map(math.isfinite, spent))} of {len(runs)})")
        rows.append(row)
    heads = ["search", "best fitness, median", "range", "candidates", "in full"]
    heads += [f"to {name} {value:.4f}" for name, value in targets.items()]
    show(
        f"{experiment.config.model}, {experiment.tasks[0].name}, {limit[0]:.0f} {limit[1]} each, "
        f"{len(next(iter(traces.values())))} seeds",
        heads,
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
