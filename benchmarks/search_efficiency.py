"""The contribution of each part of the search, for the same time or candidates and several seeds.

It compares evolution with random search, and with evolution by other settings, such as without
broods, exploration, mask fingerprints, stages or simplification. All start without seed metrics, in
this process, on the same statistics. It reports the best fitness at the end, and the time
to reach the fitness of Wanda per row and of mul(W, G) over the model. Then it counts random trees
as texts, as simplified texts and as masks.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from real_run import RealRun
from rich.progress import Progress
from tables import conditions, show, write_json

from configs import schema
from pruning.baselines import NAMED
from pruning.criterion import Criterion
from pruning.masks import DegenerateScores
from search.breeding.primitives import primitive_set
from search.breeding.simplify import simplify
from search.breeding.variation import random_metric, seeded
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Fingerprints
from search.fitness import Evaluator
from search.population import Candidate, State
from search.probe import Probe
from search.yardstick import asking, scale_of

VARIANTS: dict[str, list[str]] = {
    "evolution": [],
    "random search": [
        *("search.crossover=0", "search.mutation=0", "search.regroup=0"),
        *("search.brood=1", "search.exploration=0"),
    ],
    "no broods": ["search.brood=1"],
    "broods of 4": ["search.brood=4"],
    "broods of 16": ["search.brood=16"],
    "broods of 32": ["search.brood=32"],
    "no exploration": ["search.exploration=0"],
    "no products": ["search.products=0"],
    "half products": ["search.products=0.5"],
    "half exchange": ["search.exchange=0.5"],
    "exchange": ["search.exchange=1"],
    "deeper trees": ["search.min_initial_depth=2", "search.max_initial_depth=4"],
    "no leeway": ["search.leeway=null"],
    "free group": ["pruning.group=free"],
    "units": ["search.units=off"],
    "no units": ["search.units=required"],
    "no fingerprints": ["search.fingerprint=false", "search.brood=1"],
    "no stages": ["search.stages=[]"],
    "no simplification": ["search.simplify=false"],
}
"""Overrides of the config, by variant."""

TARGETS = {
    "wanda": "Wanda (row)",
    "snip": "mul(W, G) (model)",
    "directed-snip-wanda": "directed-snip-wanda",
}


class Limit(NamedTuple):
    """Where a search ends, and in what its way to a target is counted: `s` or `candidates`."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:.0f} {self.unit}"


@dataclass(frozen=True)
class Trace:
    """One search: best fitness, candidates, full evaluations, and the way to each target."""

    best: float
    candidates: int
    evaluated: int
    reached: dict[str, float | None]


def main(
    config: Annotated[Path | None, typer.Option(help="Experiment; none: the embedded one.")] = None,
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
    trees: Annotated[int, typer.Option(help="Random trees that are counted.")] = 2000,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print two tables."""
    limit = Limit(candidates, "candidates") if candidates else Limit(seconds, "s")
    base = ["search.seeds=[]", "search.candidates=1000000", *(overrides or [])]
    real = RealRun(run) if run else None
    config = run / "config.yaml" if run else config
    plain = resolve(schema.load(config, base)).read_texts()
    bench = _Bench(plain, real)
    tried = {name: VARIANTS[name] for name in variants.split(",")} if variants else VARIANTS
    targets = {name: bench.fitness_of(name) for name in TARGETS}
    traces: dict[str, list[Trace]] = {variant: [] for variant in tried}
    with Progress(transient=True) as progress:
        task = progress.add_task("searching", total=seeds * len(tried))
        # Seeds in the outer loop, so that a slowdown of the machine affects all variants.
        for seed in range(seeds):
            for variant, changes in tried.items():
                changed = resolve(schema.load(config, [*base, f"search.seed={seed}", *changes]))
                there = replace(changed, windows=plain.windows)
                traces[variant].append(bench.search(there, limit, targets))
                progress.advance(task)
    counts = _count(plain, bench.fingerprints, trees)
    _print(plain, traces, targets, limit, counts)
    found = {name: [vars(trace) for trace in runs] for name, runs in traces.items()}
    figures = {"limit": str(limit), "targets": targets, "runs": found, "trees": counts}
    write_json(json, {**conditions(plain.config.dtype), **figures})


class _Bench:
    """Models and statistics that all searches share."""

    def __init__(self, experiment: Experiment, real: RealRun | None) -> None:
        if real:
            self.evaluator = real.evaluator(experiment.setup)
            self.fingerprints = real.fingerprints
            return
        self.evaluator = Evaluator(experiment.setup)
        probes = []
        for subject in range(len(experiment.subjects)):
            statistics = self.evaluator.collect_statistics(subject)
            self.evaluator.use_statistics(subject, statistics)
            probes.append(Probe.from_tensors(self.evaluator.probe_tensors(subject)))
        seconds = [self.evaluator.seconds_of(task) for task in range(len(experiment.tasks))]
        aggregate = experiment.config.search.aggregate
        ask = asking(self.evaluator)
        self.evaluator.use_scale(scale_of(experiment.setup, aggregate, ask, seconds=seconds))
        self.fingerprints = Fingerprints(
            [(probes[task.subject], task.target) for task in experiment.tasks]
        )
        self.evaluator.evaluate(Candidate(0, Criterion.parse("W", "row")))  # warms up

    def fitness_of(self, name: str) -> float:
        """Return a named metric's fitness."""
        outcome = self.evaluator.evaluate(Candidate(0, NAMED[name].criterion))
        assert outcome.fitness is not None
        return outcome.fitness

    def search(self, experiment: Experiment, limit: Limit, targets: Mapping[str, float]) -> Trace:
        """Search until the limit."""
        self.evaluator.setup = experiment.setup
        marks = Fingerprints(self.fingerprints.tasks)  # a copy that has seen no masks
        known = marks if experiment.config.search.fingerprint else None
        evolution = Evolution(experiment.settings, known, State())
        # CPU time of this process, which runs on one thread: other load does not count.
        began, evaluated = time.process_time(), 0
        reached: dict[str, float | None] = dict.fromkeys(targets)
        # Each outcome is told at once, so that the next candidate can be bred.
        for candidate in evolution.ask():
            outcome = candidate.decided or self.evaluator.evaluate(candidate)
            evolution.tell(candidate.index, outcome)
            evaluated += outcome.kind == "evaluated"
            passed, best = time.process_time() - began, evolution.state.best
            spent = passed if limit.unit == "s" else evolution.state.committed
            for name, fitness in targets.items():
                if reached[name] is None and best and best.rank[0] <= fitness:
                    reached[name] = spent
            if spent >= limit.amount:
                break
        fitness = evolution.state.best.rank[0] if evolution.state.best else math.inf
        return Trace(fitness, evolution.state.committed, evaluated, reached)


def _count(experiment: Experiment, fingerprints: Fingerprints, trees: int) -> dict[str, int]:
    """Count random trees of the release's primitives, by distinct texts and by masks per row."""
    variation = replace(experiment.settings.variation, primitives=primitive_set("release"))
    texts, simplified, masks = set(), set(), set()
    degenerate = 0
    for index in range(trees):
        with seeded(0, index):
            metric = random_metric(variation)
        texts.add(metric.text)
        simple = simplify(Criterion(metric, "row"))
        if simple in simplified:
            continue
        simplified.add(simple)
        try:
            masks.add(fingerprints.fingerprint(simple))
        except DegenerateScores:
            degenerate += 1
    return {
        "trees": trees,
        "distinct_texts": len(texts),
        "distinct_simplified_texts": len(simplified),
        "distinct_masks": len(masks),
        "degenerate_among_simplified": degenerate,
    }


def _print(
    experiment: Experiment,
    traces: Mapping[str, list[Trace]],
    targets: Mapping[str, float],
    limit: Limit,
    counts: Mapping[str, int],
) -> None:
    rows = []
    for variant, runs in traces.items():
        best = [run.best for run in runs]
        row = [variant, f"{statistics.median(best):.4f}", f"{max(best) - min(best):.4f}"]
        row += [f"{statistics.median([run.candidates for run in runs]):.0f}"]
        row += [f"{statistics.median([run.evaluated for run in runs]):.0f}"]
        for name in targets:
            times = [run.reached[name] for run in runs]
            hits = [value for value in times if value is not None]
            median = statistics.median([math.inf if t is None else t for t in times])
            text = f"{median:.0f} {limit.unit}" if math.isfinite(median) else "not"
            row.append(f"{text} ({len(hits)} of {len(runs)})")
        rows.append(row)
    show(
        f"{experiment.config.model}, {experiment.tasks[0].name}, {limit} each, "
        f"{len(next(iter(traces.values())))} seeds",
        [
            "search",
            "best fitness, median",
            "range",
            "candidates",
            "in full",
            *(f"to {TARGETS[name]} {value:.4f}" for name, value in targets.items()),
        ],
        rows,
    )
    show(
        "random trees of the release's primitives",
        ["", "number"],
        [[name.replace("_", " "), str(value)] for name, value in counts.items()],
    )


if __name__ == "__main__":
    typer.run(main)
