"""The contribution of each part of the search, for the same time or evaluations and several seeds.

It compares the shipped search with random search and with itself without each of its parts. All
start without seed metrics, in this process, on the same statistics. It reports the best fitness at
the end, paired by seed, and the time or the evaluations to reach the fitness of named metrics.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer
from real_run import RealRun
from rich.progress import track
from tables import ROOT, conditions, show, write_json

from configs import schema
from configs.schema import Search
from pruning.baselines import NAMED
from pruning.criterion import Criterion
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Fingerprints
from search.fitness import Evaluator
from search.population import Candidate, State


@dataclass(frozen=True)
class Variant:
    """What is different from the shipped search.

    Attributes:
        settings: Overrides of the config.
        replaced: Constants and functions of the code with what is there instead.
    """

    settings: Sequence[str] = ()
    replaced: Mapping[str, object] = field(default_factory=dict)


def _without(mutation: str) -> Variant:
    others = [name for name in Search().mutations if name != mutation]
    return Variant([f"search.mutations=[{','.join(others)}]"])


def _by_text(marks: Fingerprints, criterion: Criterion) -> str:
    """Take the place of the fingerprint: tell all texts apart whose scores make masks."""
    marks.distance(criterion, criterion)
    return str(criterion)


SHIPPED = "evolution"
"""The variant that all others are compared with."""

VARIANTS: dict[str, Variant] = {
    SHIPPED: Variant(),
    "random search": Variant(["search.crossover=0", "search.mutation=0", "search.brood=1"]),
    "no broods": Variant(["search.brood=1"]),
    "broods of 48": Variant(["search.brood=48"]),
    "no crowding": Variant(["search.crowding=0"]),
    "no parsimony": Variant(replaced={"search.population.RESOLUTION": 1e-12}),
    "no crossover": Variant(["search.crossover=0", "search.mutation=1"]),
    **{f"no {name} mutation": _without(name) for name in Search().mutations},
    "no simplification": Variant(
        replaced={"search.breeding.variation.simplify": lambda criterion: criterion}
    ),
    "no equal masks": Variant(replaced={"search.fingerprint.Fingerprints.fingerprint": _by_text}),
    "units": Variant(["search.units=off"]),
    "no leeway": Variant(replaced={"search.population.LEEWAY": 1.0}),
    "all measured to the end": Variant(
        replaced={"search.fitness.Evaluator._settled": lambda *_: None}
    ),
    "no stages": Variant(["search.stages=[]"]),
}
"""By what is missing or different."""

NOTHING_EVALUATED = 5
"""Exit code of a search whose only candidate was not evaluated to the end."""

TARGETS = ("wanda", "snip", "directed-snip-wanda")
"""Named metrics, each in its own group, whose fitness is to be reached."""

Limit = tuple[float, str]
"""Where a search ends, in `s` of CPU time or in `evaluations`."""


@dataclass(frozen=True)
class Trace:
    """One search.

    Attributes:
        best: Fitness.
        candidates: All that were bred.
        evaluated: Those that have a fitness.
        tokens: Tokens that were measured.
        reached: What it took to reach each named metric's fitness, in the unit of the limit.
        metric: The best one's formula.
    """

    best: float
    candidates: int
    evaluated: int
    tokens: int
    reached: dict[str, float | None]
    metric: str


def main(
    config: Annotated[str | None, typer.Option(help="Experiment; none: the embedded one.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder in place of a config: its statistics, too.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Some of them, by commas; none: all.")] = "",
    seconds: Annotated[float, typer.Option(help="Busy time of each search.")] = 60.0,
    candidates: Annotated[
        int | None, typer.Option(help="Measured candidates of each search, in place of a time.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Searches of each kind.")] = 5,
    first_seed: Annotated[int, typer.Option(help="The first one's seed.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    limit: Limit = (candidates, "evaluations") if candidates else (seconds, "s")
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
        searches = [
            (seed, variant) for seed in range(first_seed, first_seed + seeds) for variant in tried
        ]
        for seed, variant in track(searches, "searching", transient=True):
            settings = [*base, f"search.seed={seed}", *tried[variant].settings]
            changed = resolve(schema.load(run / "config.yaml", settings))
            there = replace(changed, windows=real.experiment.windows)
            with ExitStack() as replaced:
                for name, value in tried[variant].replaced.items():
                    replaced.enter_context(mock.patch(name, value))
                traces[variant].append(_search(evaluator, real.fingerprints, there, limit, targets))
            runs = {name: list(map(vars, of_variant)) for name, of_variant in traces.items()}
            figures = {"limit": f"{limit[0]:.0f} {limit[1]}", "targets": targets, "runs": runs}
            write_json(json, {**conditions(real.experiment.config.dtype), **figures})
    _print(real.experiment, traces, targets, limit)


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
    began, kinds, tokens = time.process_time(), Counter[str](), 0
    reached: dict[str, float | None] = dict.fromkeys(targets)
    # Each outcome is told at once, so that the next candidate can be bred.
    for candidate in evolution.ask():
        outcome = candidate.decided or evaluator.evaluate(candidate)
        evolution.tell(candidate.index, outcome)
        kinds[outcome.kind] += 1
        tokens += outcome.tokens
        passed, best = time.process_time() - began, evolution.state.best
        spent = passed if limit[1] == "s" else kinds["evaluated"] + kinds["stopped"]
        for name, fitness in targets.items():
            if reached[name] is None and best and best.rank[0] <= fitness:
                reached[name] = spent
        if spent >= limit[0]:
            break
    best = evolution.state.best
    return Trace(
        best.rank[0] if best else math.inf,
        evolution.state.committed,
        kinds["evaluated"],
        tokens,
        reached,
        best.criterion.text if best else "",
    )


def _print(
    experiment: Experiment,
    traces: Mapping[str, list[Trace]],
    targets: Mapping[str, float],
    limit: Limit,
) -> None:
    rows = []
    shipped = traces.get(SHIPPED)
    for variant, runs in traces.items():
        row = [variant, f"{statistics.median(run.best for run in runs):.4f}"]
        row.append(_difference(runs, shipped) if shipped and runs is not shipped else "")
        for of in ("candidates", "evaluated", "tokens"):
            row.append(f"{statistics.median(getattr(run, of) for run in runs):.0f}")
        for name in targets:
            spent = [math.inf if (s := run.reached[name]) is None else s for run in runs]
            median = statistics.median(spent)
            text = f"{median:.0f} {limit[1]}" if math.isfinite(median) else "not"
            row.append(f"{text} ({sum(map(math.isfinite, spent))} of {len(runs)})")
        rows.append(row)
    heads = ["search", "best fitness, median", "mean difference", "candidates", "in full", "tokens"]
    heads += [f"to {name} {value:.4f}" for name, value in targets.items()]
    show(
        f"{experiment.config.model}, {experiment.tasks[0].name}, {limit[0]:.0f} {limit[1]} each, "
        f"{len(next(iter(traces.values())))} seeds",
        heads,
        rows,
    )


def _difference(runs: Sequence[Trace], shipped: Sequence[Trace]) -> str:
    """Return the mean difference in best fitness to the same seeds, with its standard error."""
    gaps = [one.best - other.best for one, other in zip(runs, shipped, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return f"{statistics.fmean(gaps):+.4f} ± {error:.4f}"


if __name__ == "__main__":
    typer.run(main)
