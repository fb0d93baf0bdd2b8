"""One command for a machine with a GPU: does everything work there, how fast, in what memory?

It needs no network, and less than ten minutes on a card of 80 GB. The model of the last part has
random weights and LLaMA's shape, of a size that fits the card. With `--device cpu` the command
itself can be tried: a small shape, and figures that say nothing of a GPU.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated

import torch
import typer
from prune_7b import LLAMA_7B, copy_seconds, make_checkpoint, prune
from real_run import RealRun
from tables import ROOT, conditions, show, write_json

from prunevolve import evolve, read_config
from prunevolve.pruning.metric import Criterion
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import resolve
from prunevolve.search.fingerprint import tensors_digest
from prunevolve.search.records import Candidate

GIB = 2**30

SHAPES = (
    (76, ("LLaMA-2-7B", LLAMA_7B, 2048)),
    (22, ("LLaMA 1.3B", {"hidden": 2048, "intermediate": 5504, "layers": 24, "heads": 16}, 2048)),
    (7, ("LLaMA 350M", {"hidden": 1024, "intermediate": 2816, "layers": 24, "heads": 16}, 1024)),
    (0, ("LLaMA 20M", {"hidden": 256, "intermediate": 704, "layers": 4, "heads": 4}, 128)),
)
"""Least GiB of device memory, name, shape, and tokens of a window."""

TRIED = 60
"""Candidates of a search on the embedded model."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        ok: Whether what came is what was expected; None for a figure without an expectation.
    """

    check: str
    expected: str
    came: str
    ok: bool | None = None


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table; exit with 1 if a check failed."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; --device cpu tries the command itself")
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=".", prefix="gpu-") as work:
        for part in (_tests, _search, _pruning, _fitness):
            try:
                for row in part(Path(work).absolute(), device):
                    rows.append(row)
                    print(f"{row.check}: {row.came}", file=sys.stderr, flush=True)
            except Exception as error:  # noqa: BLE001 - the other parts are worth running
                rows.append(Row(part.__name__.strip("_"), "an end", f"{error!r:.300}", False))
    rows.append(Row("all of it", "", f"{time.monotonic() - began:.0f} s"))
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU, the CPU"
    marks = {None: "", True: "ok", False: "FAILED"}
    cells = [[row.check, row.expected, row.came, marks[row.ok]] for row in rows]
    show(f"{card}; torch {torch.__version__}", ["check", "expected", "came", ""], cells)
    versions = {"card": card, "cuda": torch.version.cuda}
    write_json(json, {**conditions("bfloat16"), **versions, "rows": list(map(asdict, rows))})
    if any(row.ok is False for row in rows):
        raise typer.Exit(1)


def _tests(work: Path, device: str) -> Iterator[Row]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    ran = device == "cpu" or "passed" in last
    yield Row("tests marked gpu", "all pass", last, done.returncode == 0 and ran)


def _search(work: Path, device: str) -> Iterator[Row]:
    """Search twice; compare the journals, and the best with the CPU's."""
    gpus = 1 if device == "cuda" else 0
    settings = ["ray.workers=1", f"ray.gpus_per_worker={gpus}", f"search.candidates={TRIED}"]
    for name in ("first", "second"):
        result = evolve(read_config("embedded", settings), work / name)
        yield Row(f"search of {TRIED} candidates", "", f"{result.summary['seconds']:.0f} s")
    first, second = ((work / n / "journal.jsonl").read_bytes() for n in ("first", "second"))
    came = "same journal" if first == second else "ANOTHER JOURNAL"
    yield Row("the same search again", "same journal", came, first == second)
    run = RealRun(work / "first")
    # Others were not measured to the end, and have an estimate.
    whole = [r for r in run.records if r.fitness is not None and not r.outcome.reason]
    best = sorted(whole, key=lambda record: record.rank)[:10]
    here = run.evaluator(replace(run.experiment, device="cpu"))
    again = [here.evaluate(Candidate(0, record.criterion)).fitness or inf for record in best]
    apart = max(abs(r.rank[0] - fitness) for r, fitness in zip(best, again, strict=True))
    yield Row("fitness of its ten best, on the CPU", "within 0.01", f"{apart:.4f}", apart <= 0.01)


def _pruning(work: Path, device: str) -> Iterator[Row]:
    """Prune a large model block by block, against the time that the disk needs for its files."""
    name, shape, _ = _large(device)
    make_checkpoint(shape, work / "dense")
    disk = copy_seconds(work / "dense", work / "copy")
    yield Row(f"{name}: files read and written once", "", f"{disk:.1f} s")
    for metric in ("magnitude", "wanda", "snip"):
        seconds = prune(work / "dense", metric, f"--device={device}")["took"]["seconds"]
        came = f"{seconds:.1f} s, {seconds / disk:.2f} of the disk's"
        yield Row(f"{name}: {metric} by run_prune.py", "", came)


def _fitness(work: Path, device: str) -> Iterator[Row]:
    """Measure a candidate's steps on that model."""
    name, _, length = _large(device)
    settings = [
        *(f"model={work / 'dense'}", "dtype=bfloat16", "ray.workers=0"),
        *("low_memory=true", "search.stages=[1, 2, 4]"),
        *("calibration.split=training", "calibration.windows=8", f"calibration.length={length}"),
        *("fitness.windows=8", f"fitness.length={length}"),
        *("selection.windows=2", "selection.length=128"),
        *("report.windows=2", "report.length=128"),
    ]
    experiment = resolve(read_config("embedded", settings)).read_texts()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    evaluator = Evaluator(replace(experiment, device=device))
    resident = evaluator.residents[0]
    evaluator.use_statistics(0, evaluator.collect_statistics(0))
    criterion = Criterion.parse("mul(W, G)", "model")
    target = experiment.target(0, "model")
    steps: dict[str, Callable[[], object]] = {
        f"statistics of 8 windows of {length}": lambda: evaluator.collect_statistics(0),
        "prune": lambda: resident.prune(criterion.metric, target),
        "a stage of 1 window": lambda: resident.losses("fitness", 0, 1),
        "8 windows": lambda: resident.losses("fitness", 0, 8),
    }
    took = {step: _seconds(action, device) for step, action in steps.items()}
    for step, seconds in took.items():
        yield Row(f"{name}: {step}", "", f"{seconds:.2f} s")
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0
    yield Row(f"{name}: peak of the device", "", f"{peak:.2f} GiB")
    twice = [tensors_digest(evaluator.collect_statistics(0)) for _ in range(2)]
    same = twice[0] == twice[1]
    came = "the same bits" if same else "OTHER BITS"
    yield Row(f"{name}: statistics again", "the same bits", came, same)
    size = sum(parameter.numel() for parameter in resident.store.model.parameters())
    rate = 2 * size * 8 * length / took["8 windows"] / 1e12
    yield Row(f"{name}: forward", "", f"{rate:.1f} Tflop/s")


def _large(device: str) -> tuple[str, Mapping[str, int], int]:
    """Return name, shape and window length of the largest model that fits the device."""
    memory = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else 0
    return next(about for least, about in SHAPES if least <= memory)


def _seconds(action: Callable[[], object], device: str) -> float:
    """Return the time of an action."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    typer.run(main)
