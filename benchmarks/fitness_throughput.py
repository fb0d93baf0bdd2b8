"""The cost of a candidate, and candidates decided per hour, against two other ways.

On the candidates of a real run, in this process, with one worker's threads:

- the parts of an evaluation: score, select and apply a mask, forward with loss;
- the forward pass's FLOP/s against this machine's fastest matrix product in the same dtype;
- the driver's own work: breed, simplify, fingerprint, commit, journal;
- candidates decided per hour by the search, against the plain way (reload the model in fp32,
  collect X and G again, prune by sorting rows, measure all fitness tokens), and against the same
  resident worker without fingerprints and stages.
"""

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from real_run import RealRun
from rich.progress import track
from tables import conditions, show, write_json
from torch.utils.flop_counter import FlopCounterMode

from evaluation.perplexity import window_losses
from pruning.baselines import BASELINES
from pruning.masks import Group, Layer, Model, NOfM, Row, Target, select
from pruning.models import DTYPES, linear_layers, load_model
from pruning.recipe import LayerScores
from pruning.store import ResidentStore
from pruning.update import ZERO
from pruning.walk import collect
from search.fitness import Evaluator
from search.journal import RunFolder
from search.population import Candidate, Record

GEMM_SIDE = 2048

PRUNED: dict[str, Group] = {
    "wanda": Row(),
    "magnitude": Layer(),
    "snip": Model(),
    "gblm": NOfM(2, 4),
}
"""A metric and a group to time for each kind of group."""

PRUNE, WINDOW = "prune in all, ", "forward and loss, one window"


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a search.")],
    candidates: Annotated[int, typer.Option(help="Consecutive candidates to time.")] = 150,
    first: Annotated[
        int | None, typer.Option(help="First of them; default the middle of the run.")
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(help="Calibration windows of the plain way; default the run's.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print three tables."""
    real = RealRun(run)
    evaluator = real.evaluator(real.experiment.setup)
    parts = _parts(evaluator)
    dtype = real.experiment.config.dtype
    gemm = _gemm_flops(DTYPES[dtype])
    forward = _forward_flops(evaluator)
    driver = _driver_seconds(real)
    start = len(real.records) // 2 if first is None else first
    chosen = real.records[start : start + candidates]
    ours = driver + _seconds_decided(real, evaluator, chosen)
    resident = _seconds_in_full(evaluator, chosen)
    plain = _seconds_plain(real, calibration)
    figures = Figures(
        seconds=parts,
        fitness_tokens=sum(
            real.experiment.windows[task.subject]["fitness"].tokens.numel()
            for task in real.experiment.tasks
        ),
        threads=torch.get_num_threads(),
        gemm_gflops=gemm / 1e9,
        forward_gflops=forward / 1e9,
        gemm_fraction=forward / gemm,
        driver_ms_per_candidate=1000 * driver,
        candidates_an_hour={
            "plain": 3600 / plain,
            "resident": 3600 / resident,
            "ours": 3600 / ours,
        },
        ratio_plain=plain / ours,
        ratio_resident=resident / ours,
    )
    _print(figures, real, chosen)
    write_json(json, {**conditions(dtype), **asdict(figures)})


@dataclass(frozen=True)
class Figures:
    """The figures of the tables.

    Attributes:
        seconds: Seconds of an evaluation's parts, by name.
        fitness_tokens: Fitness tokens of all tasks.
        threads: torch threads.
        gemm_gflops: GFLOP/s of the fastest matrix product in the model's dtype.
        forward_gflops: GFLOP/s of forward pass and loss.
        gemm_fraction: `forward_gflops` over `gemm_gflops`.
        driver_ms_per_candidate: Milliseconds of the driver's own work.
        candidates_an_hour: Candidates decided per hour, by way: `plain`, `resident`, `ours`.
        ratio_plain: `ours` over `plain`.
        ratio_resident: `ours` over `resident`.
    """

    seconds: Mapping[str, float]
    fitness_tokens: int
    threads: int
    gemm_gflops: float
    forward_gflops: float
    gemm_fraction: float
    driver_ms_per_candidate: float
    candidates_an_hour: Mapping[str, float]
    ratio_plain: float
    ratio_resident: float


def _print(figures: Figures, real: RealRun, chosen: Sequence[Record]) -> None:
    config, pace = real.experiment.config, figures.candidates_an_hour
    show(
        f"parts of an evaluation, {config.model}, {config.dtype}, {figures.threads} threads",
        ["part", "seconds"],
        [[name, f"{value:.3f}"] for name, value in figures.seconds.items()],
    )
    window = figures.seconds[WINDOW]
    show(
        "pruning, as a fraction of the window that decides most candidates",
        ["group", "fraction of window", "bar"],
        [
            [name.removeprefix(PRUNE), f"{value / window:.2f}", "0.50"]
            for name, value in figures.seconds.items()
            if name.startswith(PRUNE)
        ],
    )
    show(
        "rates",
        ["", "figure", "bar"],
        [
            ["fastest matrix product, GFLOP/s", f"{figures.gemm_gflops:.0f}", ""],
            ["forward with loss, GFLOP/s", f"{figures.forward_gflops:.0f}", ""],
            ["fraction", f"{figures.gemm_fraction:.2f}", "0.75"],
            ["driver, ms per candidate", f"{figures.driver_ms_per_candidate:.1f}", "5"],
        ],
    )
    show(
        f"candidates decided per hour, {figures.fitness_tokens} fitness tokens, "
        f"{len(chosen)} candidates from {chosen[0].index} on",
        ["way", "per hour", "ours is", "bar"],
        [
            ["plain", f"{pace['plain']:.1f}", f"{figures.ratio_plain:.0f} times", "150"],
            ["resident", f"{pace['resident']:.0f}", f"{figures.ratio_resident:.1f} times", "6"],
            ["ours", f"{pace['ours']:.0f}", "", ""],
        ],
    )


@torch.inference_mode()
def _parts(evaluator: Evaluator) -> dict[str, float]:
    """Return the seconds of each part, for a row metric and for a model-wide one."""
    resident = evaluator.residents[0]
    seconds = {}
    for name in ("wanda", "snip"):
        criterion = BASELINES[name].criterion
        target = evaluator.setup.tasks[0].target(criterion.group)
        lazy_scores = LayerScores(criterion.metric, resident.master, resident.statistics.of)
        seconds[f"score {criterion.text}"] = _best(partial(dict, lazy_scores))
        scores = dict(lazy_scores)
        seconds[f"select, {target.group.name}"] = _best(partial(_select_all, scores, target))
    masks = dict(select(scores, target))
    seconds["apply"] = _best(partial(_apply_all, resident.master, masks))
    for name, group in PRUNED.items():
        seconds[f"{PRUNE}{group.name}"] = _best(partial(_prune, evaluator, name, group))
    seconds[WINDOW] = _best(lambda: resident.measure(0, 1))
    return seconds


def _select_all(scores: Mapping[str, torch.Tensor], target: Target) -> None:
    for _ in select(scores, target):
        pass


def _apply_all(weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        ZERO.apply(weights[name], mask, {})


def _prune(evaluator: Evaluator, name: str, group: Group) -> None:
    resident = evaluator.residents[0]
    resident.restore()
    resident.forget_scores()  # of several tasks only the first computes them
    resident.prune(BASELINES[name].criterion.metric, Target(0.5, group))


@torch.inference_mode()
def _gemm_flops(dtype: torch.dtype) -> float:
    a, b = (torch.randn(GEMM_SIDE, GEMM_SIDE).to(dtype) for _ in range(2))
    return 2 * GEMM_SIDE**3 / _best(lambda: a @ b, repeats=10)


def _forward_flops(evaluator: Evaluator) -> float:
    """Return the FLOP/s of forward pass and loss, by torch's count of matrix products."""
    resident = evaluator.residents[0]
    window = resident.windows["fitness"][:1]
    with FlopCounterMode(display=False) as counter:
        window_losses(resident.store, window)
    return float(counter.get_total_flops()) / _best(lambda: resident.measure(0, 1), repeats=10)


def _driver_seconds(real: RealRun) -> float:
    """Replay the run with its own outcomes, and write its journal to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        copy = RunFolder.create(Path(folder) / "run")
        began = time.perf_counter()
        evolution = real.evolution()
        for record, candidate in zip(real.records, evolution.ask(), strict=False):
            assert candidate.criterion == record.criterion
            for committed in evolution.tell(candidate.index, record.outcome):
                copy.append(committed, {})
        seconds = time.perf_counter() - began
        copy.close()
    return seconds / len(real.records)


def _seconds_decided(real: RealRun, evaluator: Evaluator, chosen: Sequence[Record]) -> float:
    """Return a worker's seconds per candidate; those decided by the driver cost it none."""
    candidates = real.candidates()
    evaluator.evaluate(candidates[chosen[0].index])  # warms up
    began = time.perf_counter()
    for record in track(chosen, "our way", transient=True):
        if record.outcome.tokens:
            evaluator.evaluate(candidates[record.index])
    return (time.perf_counter() - began) / len(chosen)


def _seconds_in_full(evaluator: Evaluator, chosen: Sequence[Record]) -> float:
    """Return a resident worker's seconds per candidate without fingerprints and early stops."""
    setup = evaluator.setup
    evaluator.setup = replace(setup, stages=(), hopeless=float("inf"))
    novel = [r for r in chosen if not r.outcome.reason.startswith("same text")]
    # A sample is enough, since candidates differ only in the cost of their metric.
    sample = random.Random(0).sample(novel, min(len(novel), 30))
    began = time.perf_counter()
    for record in track(sample, "resident, all in full", transient=True):
        evaluator.evaluate(Candidate(record.index, record.criterion))
    seconds = (time.perf_counter() - began) / len(sample)
    evaluator.setup = setup
    return seconds * len(novel) / len(chosen)


def _seconds_plain(real: RealRun, calibration: int | None) -> float:
    """Return the seconds that the plain way takes for one candidate, Wanda."""
    subjects = range(len(real.experiment.subjects))
    return sum(_seconds_plain_on(real, subject, calibration) for subject in subjects)


def _seconds_plain_on(real: RealRun, subject: int, calibration: int | None) -> float:
    """Return the seconds to load a model, collect its statistics, and do each of its tasks."""
    texts = real.experiment.windows[subject]
    windows = texts["calibration"].tokens[:calibration]
    began = time.perf_counter()
    store = ResidentStore(load_model(real.experiment.subjects[subject].model, "float32"))
    collect_began = time.perf_counter()
    statistics = collect(store, windows, frozenset({"X", "G"}))
    collect_seconds = time.perf_counter() - collect_began
    for task in (task for task in real.experiment.tasks if task.subject == subject):
        with torch.no_grad():
            for name, layer in linear_layers(store.model).items():
                leaves = statistics.of(name)
                scores = BASELINES["wanda"].criterion.metric.score(W=layer.weight.abs(), **leaves)
                lowest = torch.sort(scores, dim=1, stable=True).indices
                layer.weight.scatter_(1, lowest[:, : int(scores.shape[1] * task.sparsity)], 0)
        window_losses(store, texts["fitness"].tokens)
    seconds = time.perf_counter() - began
    skipped = len(texts["calibration"].tokens) / len(windows) - 1
    return seconds + skipped * collect_seconds


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of several timings, after an untimed warm-up."""
    work()
    timings = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        timings.append(time.perf_counter() - began)
    return min(timings)


if __name__ == "__main__":
    typer.run(main)
