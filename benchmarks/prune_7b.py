"""Memory and time of pruning a model of LLaMA-7B's shape, block by block, measured from outside.

It makes random weights, and runs every pruning in its own process with a cold page cache:

- 7b: peak memory and seconds of four metrics, against the seconds that the disk alone needs to
  read the checkpoint and write it once;
- kill: two kills at random moments, each resumed; the result must be that of an undisturbed run;
- plain: on a 1.3B shape, the engine against the plain way with the whole model in memory.
"""

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from measured import ROOT, Measured, copy_seconds, drop_cache, measure
from pruning_results import (
    BARS,
    Kills,
    Leg,
    Perplexity,
    Result,
    read_digest,
    read_seconds,
    show_kills,
    show_metrics,
    show_ways,
)
from shapes import LLAMA_1_3B, LLAMA_7B, Shape, make_checkpoint
from tables import LOCAL_WIKITEXT2, conditions, wikitext2_corpora, write_json
from typer import Option

PARTS = ("7b", "kill", "plain")
METRICS = ("magnitude", "wanda", "pruner-zero", "snip")
KILLED_METRIC = "snip"

MEMORY_OPTIONS = ["--max-memory", "{memory}"]
RESUME_OPTIONS = ["--resume"]
"""The engine's options besides the request; empty for an engine that lacks them."""

KILLED_BETWEEN = (0.15, 0.85)
"""Fractions of the remaining time between which a run is killed."""

DISK_FACTOR = 4
"""Disk needed, in checkpoints: the dense one, a result, and an fp32 number per weight."""


@dataclass(frozen=True)
class Protocol:
    """The settings of every run."""

    memory: str
    samples: int
    seqlen: int
    eval_windows: int
    seed: int

    def windows(self) -> list[str]:
        """Return the options for texts and windows, shared by the engine and the plain way."""
        corpora, splits = ("embedded", "embedded"), ("calibration", "report")
        if LOCAL_WIKITEXT2.is_dir():
            corpora, splits = wikitext2_corpora(), ("all", "all")
        texts = ["--corpus", corpora[0], "--split", splits[0]]
        texts += ["--eval-corpus", corpora[1], "--eval-split", splits[1]]
        numbers = {
            "--samples": self.samples,
            "--seqlen": self.seqlen,
            "--seed": self.seed,
            "--eval-windows": self.eval_windows,
        }
        return texts + [part for name, value in numbers.items() for part in (name, str(value))]


@dataclass(frozen=True)
class Setting:
    """A checkpoint, the folder for it and all results, and the protocol."""

    shape: Shape
    work: Path
    protocol: Protocol

    @property
    def checkpoint(self) -> Path:
        return self.work / "dense"

    def make(self) -> dict[str, float]:
        """Make the checkpoint, and return its size and the seconds that it took."""
        began = time.perf_counter()
        make_checkpoint(self.shape, self.checkpoint, self.protocol.seed)
        seconds, gigabytes = time.perf_counter() - began, self.shape.size / 1e9
        _say(f"made {gigabytes:.1f} GB in {seconds:.0f} s, {gigabytes / seconds:.2f} GB/s")
        return {"gigabytes": gigabytes, "seconds": seconds}

    def engine(
        self, out: Path, metric: Sequence[str], more: Sequence[str], kill_after: float | None = None
    ) -> Measured:
        """Run the engine with a cold page cache; `metric` is a metric's text and options for it."""
        options = [option.format(memory=self.protocol.memory) for option in MEMORY_OPTIONS]
        fixed = ["--sparsity", "0.5", "--dtype", "float32", *self.protocol.windows(), *options]
        files = ["--model", str(self.checkpoint), "--out", str(out), "--metric", *metric]
        drop_cache(self.checkpoint)
        command = [sys.executable, str(ROOT / "run_prune.py"), *files, *fixed, *more]
        return measure(command, out.parent / "log.txt", kill_after)

    def pruned(self, *metric: str) -> Result:
        """Prune to the end, and remove the resulting files."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out = Path(folder) / "out"
            took = self.engine(out, metric, [])
            perplexity = Perplexity.read(out / "pruning_report.json")
            parts = read_seconds(out.parent / "log.txt")
            result = Result(took, read_digest(out), perplexity, parts)
        _say(f"{metric[0]}: {took.seconds:.1f} s, peak {took.peak_gib:.2f} GiB")
        return result


def main(
    parts: Annotated[str, Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = ",".join(PARTS),
    folder: Annotated[Path, Option(help="Folder for the temporary files.")] = Path(),
    layers: Annotated[int, Option(help="Most decoder blocks.")] = LLAMA_7B.layers,
    shrink: Annotated[int, Option(help="Divisor of all widths except the vocabulary.")] = 1,
    memory: Annotated[str, Option(help="The engine's memory limit.")] = "3.5GiB",
    samples: Annotated[int, Option(help="Calibration windows.")] = 2,
    seqlen: Annotated[int, Option(help="Tokens per window.")] = 64,
    eval_windows: Annotated[int, Option(help="Windows for perplexity.")] = 1,
    seed: Annotated[int, Option(help="Seed of weights, windows and moments of kills.")] = 0,
    json: Annotated[Path | None, Option(help="File for the figures.")] = None,
) -> None:
    """Print a table for each part; all files are removed at the end, even after an error."""
    chosen = _checked_parts(parts)
    large, small = LLAMA_7B.shrunk(layers, shrink), LLAMA_1_3B.shrunk(layers, shrink)
    _check_disk(folder, large if chosen != ["plain"] else small)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which removes files
    protocol = Protocol(memory, samples, seqlen, eval_windows, seed)
    figures = {**conditions("float32"), "protocol": asdict(protocol)}
    try:
        if chosen != ["plain"]:
            with tempfile.TemporaryDirectory(dir=folder, prefix="prune-7b-") as work:
                _large_parts(Setting(large, Path(work).absolute(), protocol), chosen, figures)
        if "plain" in chosen:
            with tempfile.TemporaryDirectory(dir=folder, prefix="prune-7b-") as work:
                figures["plain"] = _plain(Setting(small, Path(work).absolute(), protocol))
    finally:
        write_json(json, figures)  # after an error, the measurements before it


def _checked_parts(parts: str) -> list[str]:
    chosen = parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise typer.BadParameter(f"parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    return chosen


def _check_disk(folder: Path, shape: Shape) -> None:
    """Print how much disk is needed, and refuse to begin with less."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = DISK_FACTOR * shape.size / 1e9, shutil.disk_usage(folder).free / 1e9
    text = f"needs up to {needed:.1f} GB of disk in {folder.absolute()}, {free:.1f} GB are free"
    _say(text)
    if needed > free:
        raise typer.BadParameter(text)


def _large_parts(setting: Setting, chosen: list[str], figures: dict[str, object]) -> None:
    """Make the 7B shape once and run the parts on it; `figures` grows with each measurement."""
    figures["shape"], figures["made"] = asdict(setting.shape), setting.make()
    results: dict[str, Result] = {}
    if "7b" in chosen:
        io_seconds = copy_seconds(setting.checkpoint, setting.work / "copy")
        _say(f"the disk alone: {io_seconds:.1f} s to read and write it once")
        by_metric: dict[str, dict[str, object]] = {}
        figures |= {"io_seconds": io_seconds, "metrics": by_metric}
        for metric in METRICS:
            result = results[metric] = setting.pruned(metric)
            ratio = result.took.seconds / io_seconds
            by_metric[metric] = {**asdict(result), "io_ratio": ratio}
        show_metrics(_title(setting), results, io_seconds)
    if "kill" in chosen:
        undisturbed = results.get(KILLED_METRIC) or setting.pruned(KILLED_METRIC)
        kills = _kill(setting, undisturbed)
        figures["kill"] = {**asdict(kills), "equal": kills.equal, "seconds": kills.seconds}
        show_kills(KILLED_METRIC, kills)


def _kill(setting: Setting, undisturbed: Result) -> Kills:
    """Kill a run twice and resume it each time."""
    rng, remaining = random.Random(setting.protocol.seed), undisturbed.took.seconds
    moments = []
    for _ in range(2):
        moments.append(rng.uniform(*KILLED_BETWEEN) * remaining)
        remaining -= moments[-1]
    legs: list[Leg] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        out = Path(folder) / "out"
        for kill_after in (*moments, None):
            more = RESUME_OPTIONS if legs else []
            took = setting.engine(out, [KILLED_METRIC], more, kill_after)
            legs.append(Leg(kill_after, took))
            _say(f"{KILLED_METRIC}: {'killed' if took.killed else 'ended'} at {took.seconds:.1f} s")
            if not took.killed:  # it may end before its second kill
                break
        return Kills(undisturbed, legs, read_digest(out))


def _plain(setting: Setting) -> dict[str, object]:
    """Measure the engine and the plain way on one checkpoint, and show them."""
    made = setting.make()
    engine = setting.pruned("mul(W, G)", "--group", "row")
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        out = Path(folder) / "out"
        files = ["--model", str(setting.checkpoint), "--out", str(out)]
        script = str(ROOT / "benchmarks" / "plain_way.py")
        drop_cache(setting.checkpoint)
        command = [sys.executable, script, *files, *setting.protocol.windows()]
        took = measure(command, Path(folder) / "log.txt")
        perplexity = Perplexity.read(out / "perplexity.json")
    ratios = {
        "memory": engine.took.peak_gib / took.peak_gib,
        "time": engine.took.seconds / took.seconds,
    }
    ways = {"engine": (engine.took, engine.perplexity), "plain": (took, perplexity)}
    show_ways(f"mul(W, G) per row, {_title(setting)}", ways, ratios)
    return {
        "shape": asdict(setting.shape),
        "made": made,
        "engine": asdict(engine),
        "plain": {"took": asdict(took), "perplexity": asdict(perplexity)},
        "ratios": ratios,
        "bars": BARS,
    }


def _title(setting: Setting) -> str:
    shape, protocol = setting.shape, setting.protocol
    return (
        f"{shape.layers} blocks of {shape.hidden}, {shape.size / 1e9:.1f} GB in bfloat16, limit "
        f"{protocol.memory}, {protocol.samples} windows of {protocol.seqlen} tokens"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
