"""Pruning methods around metrics: what each costs and brings, on models, texts and sparsities.

Every cell is one run of `run_prune.py`, with its time and peak memory. A rise is that of log
perplexity over dense, divided by SparseGPT's in the same cell (model, target and text); below 1 is
better. Results are kept in a folder and not measured again, so a table can be made in parts.
"""

import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from prune_7b import measure
from rich.progress import track
from tables import conditions, kept, show_rises, wikitext2_corpora, write_json

METRICS = (
    *("magnitude", "wanda", "ria-full", "pruner-zero", "snip"),
    *("directed-snip-variance", "directed-snip-wanda", "sparsegpt"),
)

VARIANTS: Mapping[str, Sequence[str]] = {
    "plain": (),
    "update": ("--update", "sparsegpt"),
    "reconstruct": ("--update", "reconstruct"),
    "owl": ("--allocation", "owl"),
}
"""Options beside the metric, in each metric's own group."""

REFERENCE = "sparsegpt plain"
USAGE = 2
"""Exit code of run_prune.py for options that do not go together."""

TARGETS = ("50%", "60%", "70%", "2:4")

Result = dict[str, Any]
"""One run: perplexities by text, dense and pruned; seconds and peak GiB; or why it was refused."""


def main(
    model: Annotated[list[str], typer.Option(help="embedded, a folder or a hub id; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder that keeps the results.")],
    metric: Annotated[list[str] | None, typer.Option(help="As run_prune's; repeatable.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Some of the variants.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="50%, 2:4, ...; repeatable.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of every window.")] = 512,
    windows: Annotated[int, typer.Option(help="Test windows of each kind of text.")] = 8,
    dtype: Annotated[str, typer.Option(help="As run_prune's.")] = "auto",
    keep: Annotated[
        bool, typer.Option(help="Keep statistics for the next run, which is faster than it was.")
    ] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Print a table of rises."""
    out.mkdir(parents=True, exist_ok=True)
    variants = variant or list(VARIANTS)
    methods = [REFERENCE]
    methods += [f"{m} {v}" for m, v in itertools.product(metric or METRICS, variants)]
    runs = list(itertools.product(model, target or TARGETS, dict.fromkeys(methods)))
    texts = {"samples": samples, "seqlen": seqlen, "eval-windows": windows, "dtype": dtype}
    results: dict[str, dict[str, Result]] = {}
    for name, goal, method in track(runs, "pruning", transient=True):
        cell = f"{Path(name).name} {goal}"
        words = " ".join(map(str, (cell, method, *texts.values())))
        path = out / f"{words.replace(' ', '_').replace('/', '-')}.json"
        result = kept(path, partial(_run, name, goal, method, texts, out, keep))
        results.setdefault(method, {})[cell] = result
    rises = {method: _rises(by_cell, results[REFERENCE]) for method, by_cell in results.items()}
    _print_rises(rises, results)
    figures = {"results": results, "rises": rises, "texts": texts}
    write_json(json_, {**conditions(dtype), **figures})


def _run(
    model: str, goal: str, method: str, texts: Mapping[str, object], out: Path, keep: bool
) -> Result:
    metric, _, variant = method.partition(" ")
    pruned, log = out / "pruned", out / "output"
    shutil.rmtree(pruned, ignore_errors=True)
    command = [
        *(sys.executable, "run_prune.py", "--model", model, "--out", str(pruned)),
        *("--metric", metric, *VARIANTS[variant], *_texts(model)),
        *itertools.chain(*((f"--{key}", str(value)) for key, value in texts.items())),
    ]
    command += ["--pattern", goal] if ":" in goal else ["--sparsity", f"{int(goal[:-1]) / 100}"]
    command += ["--statistics", str(out / f"statistics-{Path(model).name}")] if keep else []
    took = measure(command, log, allowed=USAGE)
    if took["code"] == USAGE:
        return {"refused": log.read_text().strip().splitlines()[-1:]}
    report = json.loads((pruned / "pruning_report.json").read_text())
    shutil.rmtree(pruned)
    return {
        "perplexity": {Path(text["corpus"]).name: text["pruned"] for text in report["by_text"]},
        "dense": {Path(text["corpus"]).name: text["dense"] for text in report["by_text"]},
        "seconds": round(took["seconds"], 1),
        "peak_gib": round(took["peak_gib"], 2),
    }


def _texts(model: str) -> Iterator[str]:
    """Yield the options for two kinds of text; the embedded model has its own."""
    if model != "embedded":
        validation, test = wikitext2_corpora()
        yield from ("--corpus", validation, "--split", "validation[:50%]")
        yield from ("--corpus", "embedded", "--split", "training")
        yield from ("--eval-corpus", test, "--eval-split", "test")
        yield from ("--eval-corpus", "embedded", "--eval-split", "report")


def _rises(by_cell: Mapping[str, Result], reference: Mapping[str, Result]) -> dict[str, float]:
    """Return the rises of a method by cell and text, without what was refused."""
    rises = {}
    for cell, result in by_cell.items():
        for text, dense in result.get("dense", {}).items():
            base = math.log(dense)
            unit = math.log(reference[cell]["perplexity"][text]) - base
            perplexity = result["perplexity"][text] or math.inf
            rises[f"{cell} {text}"] = (math.log(perplexity) - base) / unit
    return rises


def _print_rises(
    rises: Mapping[str, Mapping[str, float]], results: Mapping[str, Mapping[str, Result]]
) -> None:
    seconds, memory = {}, {}
    for method, by_cell in results.items():
        if done := [result for result in by_cell.values() if "seconds" in result]:
            seconds[method] = f"{fmean(result['seconds'] for result in done):.0f}"
            memory[method] = f"{max(result['peak_gib'] for result in done):.2f}"
    title = f"rises of log perplexity, of {REFERENCE}'s"
    show_rises(title, rises, {"seconds": seconds, "GiB": memory})


if __name__ == "__main__":
    typer.run(main)
