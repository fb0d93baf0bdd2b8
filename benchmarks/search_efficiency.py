"""The contribution of each part of the search, for the same time and several seeds.

It compares the shipped search with random search and with itself without each of its parts. All
start without seed metrics, in this process, on the same statistics. It reports the best fitness at
the end, paired by seed.
"""

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated
from unittest import mock

import typer
from real_run import RealRun
from rich.progress import track
from tables import conditions, show, write_json

from prunevolve import Unfinished, evolve, read_config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.evolution import Evolution, State
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.fingerprint import Fingerprints


@dataclass(frozen=True)
class Variant:
    """What is different from the shipped search."""

    settings: Sequence[str] = ()  # overrides of the config
    replaced: Mapping[str, object] = field(default_factory=dict)  # constants and functions by name


def _by_text(marks: Fingerprints, criterion: Criterion) -> str:
    """Take the place of the fingerprint: tell all texts apart whose scores make masks."""
    marks.fingerprint(criterion)
    return str(criterion)


_BREEDING = "prunevolve.search.breeding.variation"
_FINGERPRINTS = "prunevolve.search.fingerprint.Fingerprints"
_DESCENTS = "prunevolve.search.evolution.DESCENTS"
_STARTS = "prunevolve.search.evolution.STARTS"
_NO_DESCENTS: Mapping[str, object] = {_DESCENTS: math.inf}

SHIPPED = "evolution"  # which all others are compared with

VARIANTS: dict[str, Variant] = {
    SHIPPED: Variant(),
    "random search": Variant(["search.population=5000"], _NO_DESCENTS),
    "paper": Variant(
        [
            *("search.primitives=release", "search.units=off", "pruning.group=row"),
            *("search.population=50", "search.parents=10", "search.initial_depth=[2,4]"),
            *("search.crossover=1.0", "search.mutation=0.5", "search.max_size=31", "search.lag=0"),
            "search.stages=[]",
        ]
    ),
    # As gplearn breeds: subtrees, node by node, of all operators and numbers.
    "trees": Variant(["search.initial_depth=[2,4]"], {f"{_BREEDING}.Breeder.descends": False}),
    "no parsimony": Variant(replaced={"prunevolve.search.records.RESOLUTION": 1e-12}),
    "no grown factors": Variant(replaced={"prunevolve.search.breeding.factors.GROWN": 0.0}),
    "no simplification": Variant(replaced={f"{_BREEDING}.simplify": lambda criterion: criterion}),
    "no equal masks": Variant(replaced={f"{_FINGERPRINTS}.fingerprint": _by_text}),
    "no descents": Variant(replaced=_NO_DESCENTS),
    "descents alone": Variant(replaced={_DESCENTS: 1, _STARTS: math.inf}),
    **{f"1 of {n} descends": Variant(replaced={_DESCENTS: n}) for n in (4, 8, 16, 32)},
    "units": Variant(["search.units=off"]),
    "no stages": Variant(["search.stages=[]"]),
    **{f"lag of {lag}": Variant([f"search.lag={lag}"]) for lag in (0, 16, 64, 256)},
}
"""By what is missing or different."""

Trace = JsonObject
"""One search: its best fitness and metric, how many candidates were bred, and more."""


def main(
    run: Annotated[
        Path | None, typer.Option(help="Run folder; none: a new one on the embedded model.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
    variants: Annotated[str, typer.Option(help="Some of them, by commas; none: all.")] = "",
    seconds: Annotated[float, typer.Option(help="Processor time of each search.")] = 60.0,
    seeds: Annotated[int, typer.Option(help="Searches of each kind.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    base = ["search.seeds=[]", *(overrides or [])]
    tried = {name: VARIANTS[name] for name in variants.split(",")} if variants else VARIANTS
    with tempfile.TemporaryDirectory() as temporary:
        run = run or _prepared(base, Path(temporary) / "run")
        base.append("search.candidates=1000000")
        real = RealRun(run, base)
        evaluator = real.evaluator(real.experiment)
        traces: dict[str, list[Trace]] = {variant: [] for variant in tried}
        # Seeds in the outer loop, so that a slowdown of the machine affects all variants.
        searches = list(product(range(seeds), tried))
        for seed, variant in track(searches, "searching", transient=True):
            settings = [*base, f"search.seed={seed}", *tried[variant].settings]
            changed = resolve(read_config(run / "config.yaml", settings))
            there = replace(changed, subjects=real.experiment.subjects)
            with ExitStack() as replaced:
                for name, value in tried[variant].replaced.items():
                    replaced.enter_context(mock.patch(name, value))
                marks = Fingerprints(real.fingerprints.tasks)  # a copy that has seen no masks
                traces[variant].append(_search(evaluator, marks, there, seconds))
            figures = {"limit": f"{seconds:g} s", "runs": traces}
            write_json(json, {**conditions(real.experiment.config.dtype), **figures})
    what = f"{real.experiment.config.model}, {real.experiment.tasks[0].name}"
    _print(f"{what}, {seconds:g} s each, {seeds} seeds", traces)


def _prepared(settings: list[str], out: Path) -> Path:
    """Make a run of one candidate, for its statistics, probe and scale; return its folder."""
    config = read_config("embedded", [*settings, "search.candidates=1", "ray.workers=0"])
    with suppress(Unfinished):  # the candidate may not have been evaluated to the end
        evolve(config, out)
    return out


def _search(
    evaluator: Evaluator, marks: Fingerprints, experiment: Experiment, limit: float
) -> Trace:
    """Search for so many seconds of processor time; return what came of it."""
    evaluator.experiment = experiment
    evolution = Evolution(experiment.breeder, marks, State())
    kinds, tokens, began = Counter[str](), 0, time.process_time()
    # Each outcome is told at once, so that the next candidate can be bred.
    for candidate in evolution.ask():
        outcome = candidate.decided or evaluator.evaluate(candidate)
        evolution.tell(candidate.index, outcome)
        kinds[outcome.kind] += 1
        tokens += outcome.tokens
        if time.process_time() - began >= limit:
            break
    best = evolution.state.best
    return {
        "best": best.rank[0] if best else math.inf,
        "candidates": evolution.state.committed,
        "evaluated": kinds["evaluated"],
        "tokens": tokens,
        "metric": best.criterion.text if best else "",
    }


def _print(title: str, traces: Mapping[str, list[Trace]]) -> None:
    rows = []
    shipped = traces.get(SHIPPED)
    for variant, runs in traces.items():
        row = [variant, f"{statistics.median(run['best'] for run in runs):.4f}"]
        row.append(_difference(runs, shipped) if shipped and runs is not shipped else "")
        for of in ("candidates", "evaluated", "tokens"):
            row.append(f"{statistics.median(run[of] for run in runs):.0f}")
        rows.append(row)
    heads = ["search", "best fitness, median", "mean difference", "candidates", "in full", "tokens"]
    show(title, heads, rows)


def _difference(runs: Sequence[Trace], shipped: Sequence[Trace]) -> str:
    """Return the mean difference in best fitness to the same seeds, with its standard error."""
    gaps = [one["best"] - other["best"] for one, other in zip(runs, shipped, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return f"{statistics.fmean(gaps):+.4f} ± {error:.4f}"


if __name__ == "__main__":
    typer.run(main)
