"""The first hour on a machine with a GPU: does everything work there, how fast, in what memory?

It needs no network. With `--device far`, a stand-in that computes on the CPU and refuses what a GPU
refuses, or `--device cpu` the command itself can be tried: smaller sizes, and figures that say
nothing of a GPU.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import torch
import typer
from fitness_throughput import replayed, seconds_decided
from prune_7b import LLAMA_7B, copy_seconds, make_checkpoint
from real_run import RealRun
from tables import ROOT, conditions, show, write_json

from prunevolve import evolve, read_config
from prunevolve.configs.schema import ROLES
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.run.command import apply
from prunevolve.pruning.run.job import make_job
from prunevolve.pruning.run.options import RECIPES, Request, make, read_recipe
from prunevolve.search import run as search_run
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.fingerprint import tensors_digest
from prunevolve.search.records import Candidate

Result = TypeVar("Result")

GIB = 2**30

NO_GPU = {"far": "NO GPU: a stand-in, on the CPU", "cpu": "NO GPU: the CPU"}

MODELS = {
    "embedded": "",
    "models/smollm2-135m": "make smollm2",
    "models/gemma3-270m": "make gemma3",
}
"""The models that a candidate is evaluated on, and what builds them."""

WEIGHTED_GRADIENT = Criterion.parse("mul(W, G)", "model")


class Sizes(NamedTuple):
    """How much is done."""

    shape: dict[str, int]  # of a LLaMA with random weights
    length: int  # tokens of a window
    samples: int  # windows for calibration
    tried: int  # candidates of a search on the embedded model
    prunings: tuple[str, ...]  # of a real model
    settings: tuple[str, ...] = ()  # of that search


FULL = Sizes(
    LLAMA_7B | {"layers": 4}, 2048, 32, 60, ("magnitude", "wanda", "sparsegpt", "fast", "best")
)
TRIAL = Sizes(
    {"hidden": 64, "intermediate": 176, "layers": 2, "heads": 4},
    *(64, 4, 6),
    ("magnitude", "best"),
    ("search.primitives=release", "search.population=4", *(f"{role}.windows=2" for role in ROLES)),
)
"""For a device that is no GPU."""


class Row(NamedTuple):
    """One check."""

    check: str
    expected: str
    came: str
    ok: bool | None = None  # None for a figure without an expectation


def main(
    device: Annotated[str, typer.Option(help="cuda; far or cpu to try the command.")] = "cuda",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exit with 1 if a check failed."""
    if device not in NO_GPU and not (device == "cuda" and torch.cuda.is_available()):
        raise typer.BadParameter("no such device here; --device far tries the command itself")
    if device == "far":
        sys.path.append(str(ROOT / "tests" / "helpers"))
        import_module("far_device").far_device()
    rows: list[Row] = []
    began = time.monotonic()
    sizes = FULL if device == "cuda" else TRIAL
    with tempfile.TemporaryDirectory(dir=".", prefix="gpu-") as work:
        for part in (_tests, _candidates, _prunings, _shape, _search):
            try:
                for row in part(Path(work).absolute(), device, sizes):
                    rows.append(row)
                    print(f"{row.check}: {row.came}", file=sys.stderr, flush=True)
            except Exception as error:  # noqa: BLE001 - the other parts are worth running
                rows.append(Row(part.__name__.strip("_"), "an end", f"{error!r:.300}", False))
    rows.append(Row("all of it", "", f"{time.monotonic() - began:.0f} s"))
    card = NO_GPU.get(device) or torch.cuda.get_device_name()
    marks = {None: "", True: "ok", False: "FAILED"}
    cells = [[row.check, row.expected, row.came, marks[row.ok]] for row in rows]
    show(f"{card}; torch {torch.__version__}", ["check", "expected", "came", ""], cells)
    figures = {"card": card, "cuda": torch.version.cuda, "rows": [row._asdict() for row in rows]}
    write_json(json, {**conditions("bfloat16"), **figures})
    raise typer.Exit(1 if any(row.ok is False for row in rows) else 0)


def _tests(work: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    ran = device != "cuda" or "passed" in last
    yield Row("tests marked gpu", "all pass", last, done.returncode == 0 and ran)


def _candidates(work: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Evaluate a candidate on each model, a trial on the embedded one, here and on the CPU."""
    for model, how in MODELS.items():
        check, folder = f"{model}: losses of a candidate", ROOT / model
        if how and device != "cuda":
            continue
        if how and not folder.is_dir():
            yield Row(check, "as on the CPU", f"not there: {how} builds it")
            continue
        experiment = _experiment(folder if how else model, "float32", windows=4, length=128)
        here, there = (_losses(experiment, where) for where in (device, "cpu"))
        apart = ((here - there).abs() / there).max().item()
        yield Row(check, "within 0.5% of the CPU's", f"{apart:.4%}", apart < 5e-3)


def _losses(experiment: Experiment, device: str) -> torch.Tensor:
    evaluator = Evaluator(replace(experiment, device=device))
    resident = evaluator.residents[0]
    resident.use_statistics(evaluator.collect_statistics(0))
    resident.prune(WEIGHTED_GRADIENT.metric, experiment.target(0, WEIGHTED_GRADIENT.group))
    return torch.tensor(resident.losses("fitness"))


def _prunings(work: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Prune a real model in some ways."""
    built = [str(ROOT / name) for name, how in MODELS.items() if how and (ROOT / name).is_dir()]
    model = built[0] if built and device == "cuda" else "embedded"
    windows = {"samples": sizes.samples, "eval_windows": 16}
    for method in sizes.prunings:
        options = {**windows, "model": model, **_method(method)}
        report, seconds, peak = _pruned(work / f"pruned-{method}", device, options)
        dense, pruned = (f"{report[f'{x}_perplexity']:.2f}" for x in ("dense", "pruned"))
        came = f"{seconds:.1f} s, {peak}; perplexity {dense} to {pruned}"
        yield Row(f"{Path(model).name}: {method}", "", came)


def _method(name: str) -> JsonObject:
    """Return the options of a recipe or a metric."""
    return read_recipe(name, None) if name in RECIPES else {"metric": name}


def _pruned(out: Path, device: str, options: JsonObject) -> tuple[JsonObject, float, str]:
    """Prune in this process, and return the report, seconds, and the device's peak."""
    given = options | {"out": str(out), "device": device}
    with (out.parent / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        job = make_job(make(Request, given, "gpu.py"), resume=False)
        return _measured(lambda: apply(job), device)


def _shape(work: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Prune and measure a few blocks of LLaMA-2-7B's shape, with random weights."""
    name = f"{sizes.shape['layers']} blocks of {sizes.shape['hidden']}"
    make_checkpoint(sizes.shape, work / "dense")
    disk = copy_seconds(work / "dense", work / "copy")
    yield Row(f"{name}: files read and written once", "", f"{disk:.1f} s")
    windows = {"samples": sizes.samples, "seqlen": sizes.length, "eval_windows": 2}
    for method in ("magnitude", "wanda", "snip", "fast"):
        options = {**windows, "model": str(work / "dense"), **_method(method)}
        _, seconds, peak = _pruned(work / f"shape-{method}", device, options)
        came = f"{seconds:.1f} s, {seconds / disk:.2f} of the disk's, {peak}"
        yield Row(f"{name}: {method}", "", came)
    yield from _fitness(name, work / "dense", device, sizes)


def _fitness(name: str, model: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Measure a candidate's steps on that model."""
    experiment = _experiment(model, "bfloat16", windows=8, length=sizes.length)
    evaluator = Evaluator(replace(experiment, device=device))
    resident, statistics = evaluator.residents[0], evaluator.collect_statistics(0)
    resident.use_statistics(statistics)
    target = experiment.target(0, WEIGHTED_GRADIENT.group)
    steps: dict[str, Callable[[], object]] = {
        f"statistics of 8 windows of {sizes.length}": lambda: evaluator.collect_statistics(0),
        "prune": lambda: resident.prune(WEIGHTED_GRADIENT.metric, target),
        "a stage of 1 window": lambda: resident.losses("fitness", 0, 1),
        "8 windows": lambda: resident.losses("fitness", 0, 8),
    }
    seconds = 0.0
    for step, action in steps.items():
        _, seconds, peak = _measured(action, device)
        yield Row(f"{name}: {step}", "", f"{seconds:.2f} s, {peak}")
    size = sum(parameter.numel() for parameter in resident.store.model.parameters())
    rate = 2 * size * 8 * sizes.length / seconds / 1e12
    yield Row(f"{name}: forward", "", f"{rate:.1f} Tflop/s")
    same = tensors_digest(evaluator.collect_statistics(0)) == tensors_digest(statistics)
    came = "the same bits" if same else "OTHER BITS"
    yield Row(f"{name}: statistics again", "the same bits", came, same)


def _search(work: Path, device: str, sizes: Sizes) -> Iterator[Row]:
    """Search twice; compare the journals and the best with the CPU's, and time candidates."""
    gpus = 1 if device == "cuda" else 0
    settings = [f"ray.workers={gpus}", f"ray.gpus_per_worker={gpus}", *sizes.settings]
    config = read_config("embedded", [*settings, f"search.candidates={sizes.tried}"])
    if not gpus:  # a config's device is the CPU or a GPU
        setattr(search_run, "resolve", lambda x: replace(resolve(x), device=device))  # noqa: B010
    for name in ("first", "second"):
        result = evolve(config, work / name)
        seconds = result.summary["seconds"]
        yield Row(f"search of {sizes.tried} candidates", "", f"{seconds:.0f} s")
    first, second = ((work / n / "journal.jsonl").read_bytes() for n in ("first", "second"))
    came = "same journal" if first == second else "ANOTHER JOURNAL"
    yield Row("the same search again", "same journal", came, first == second)
    run = RealRun(work / "first")
    # Others were not measured to the end, and have an estimate.
    whole = [r for r in run.records if r.fitness is not None and not r.outcome.reason]
    best = sorted(whole, key=lambda record: record.rank)[:10]
    cpu = run.evaluator(replace(run.experiment, device="cpu"))
    again = [cpu.evaluate(Candidate(0, record.criterion)).fitness or inf for record in best]
    apart = max(abs(r.rank[0] - fitness) for r, fitness in zip(best, again, strict=True))
    yield Row("fitness of its ten best, on the CPU", "within 0.01", f"{apart:.4f}", apart <= 0.01)
    driver, asked = replayed(run)
    here = run.evaluator(replace(run.experiment, device=device))
    worker = seconds_decided(here, run.records, asked)
    yield Row("candidates an hour, one worker", "", f"{3600 / (driver + worker):,.0f}")
    fraction = driver / (driver + worker)
    yield Row("the driver's share", "", f"{fraction:.1%}, {1000 * driver:.1f} ms a candidate")


def _experiment(model: Path | str, dtype: str, windows: int, length: int) -> Experiment:
    """Return an experiment on a model, with the texts that ship."""
    settings = [f"model={model}", f"dtype={dtype}", "low_memory=true", "search.stages=[]"]
    settings.append("calibration.split=training")
    for role in ROLES:
        used = role in ("calibration", "fitness")
        settings.append(f"{role}.windows={windows if used else 2}")
        settings.append(f"{role}.length={length if used else 64}")
    return resolve(read_config("embedded", settings)).read_texts()


def _measured(action: Callable[[], Result], device: str) -> tuple[Result, float, str]:
    """Return an action's result and seconds, and the peak of the device's memory in words."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if device == "cuda" else "no peak"
    return result, seconds, peak


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    typer.run(main)
