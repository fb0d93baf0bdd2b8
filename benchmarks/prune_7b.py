"""Memory and time of pruning a model of LLaMA-7B's shape, block by block, from outside.

On random weights that are made here, each run a process of its own, its files not in memory when
it begins:

- 7b: peak memory and seconds of four metrics, beside the seconds that the disk alone needs to
  read the checkpoint and write it once;
- kill: two kills at random moments, each resumed; the result must be the undisturbed run's;
- plain: on a 1.3B shape, the engine beside the plain way with the whole model in memory.
"""

import json as json_files
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import typer
from measured import ROOT, Measured, copy_seconds, drop_cache, measure
from shapes import LLAMA_1_3B, LLAMA_7B, Shape, make_checkpoint
from tables import LOCAL_WIKITEXT2, conditions, show, wikitext2_corpora, write_json
from typer import Option

PARTS = ("7b", "kill", "plain")
METRICS = ("magnitude", "wanda", "pruner-zero", "snip")
KILLED_METRIC = "snip"

MEMORY_OPTIONS = ["--max-memory", "{memory}"]
RESUME_OPTIONS = ["--resume"]
"""What the engine is called with besides the request; empty lists for an engine without them."""

KILLED_BETWEEN = (0.15, 0.85)
"""Fractions of the time that is left, between which a run is killed."""

BARS = {"memory": 0.25, "time": 1.6}
"""The engine's share of the plain way's memory and time that is still good enough."""

DISK_FACTOR = 4
"""Disk needed, in checkpoints: the dense one, a result, an fp32 number a weight set aside."""


@dataclass(frozen=True)
class Protocol:
    """What every run is asked for."""

    memory: str
    samples: int
    seqlen: int
    eval_windows: int
    seed: int

    def windows(self) -> list[str]:
        """Return the options of texts and windows, which the engine and the plain way share."""
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
    """A checkpoint, the folder that holds it and all results, and the protocol."""

    shape: Shape
    work: Path
    protocol: Protocol

    @property
    def checkpoint(self) -> Path:
        return self.work / "dense"

    def make(self) -> dict[str, float]:
        """Make the checkpoint, and return how large it is and how long that took."""
        began = time.perf_counter()
        make_checkpoint(self.shape, self.checkpoint, self.protocol.seed)
        seconds, gigabytes = time.perf_counter() - began, self.shape.size / 1e9
        _say(f"made {gigabytes:.1f} GB in {seconds:.0f} s, {gigabytes / seconds:.2f} GB/s")
        return {"gigabytes": gigabytes, "seconds": seconds}

    def engine(
        self, out: Path, metric: Sequence[str], more: Sequence[str], kill_after: float | None = None
    ) -> Measured:
        """Run the engine on a cold page cache; `metric` is its text and options of it."""
        options = [option.format(memory=self.protocol.memory) for option in MEMORY_OPTIONS]
        fixed = ["--sparsity", "0.5", "--dtype", "float32", *self.protocol.windows(), *options]
        files = ["--model", str(self.checkpoint), "--out", str(out), "--metric", *metric]
        drop_cache(self.checkpoint)
        command = [sys.executable, str(ROOT / "run_prune.py"), *files, *fixed, *more]
        return measure(command, out.parent / "log.txt", kill_after)

    def pruned(self, *metric: str) -> dict[str, Any]:
        """Prune to the end, remove the result, and return its figures."""
        with tempfile.TemporaryDirectory(dir=self.work) as room:
            out = Path(room) / "out"
            measured = self.engine(out, metric, [])
            parts = _seconds_by_part(out.parent / "log.txt")
            figures = {**_figures(measured), **_outcome(out), "seconds_by_part": parts}
        _say(f"{metric[0]}: {measured.seconds:.1f} s, peak {measured.peak_gib:.2f} GiB")
        return figures


def main(
    parts: Annotated[str, Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = ",".join(PARTS),
    folder: Annotated[Path, Option(help="Holds a temporary folder with all files.")] = Path(),
    layers: Annotated[int, Option(help="At most so many blocks.")] = LLAMA_7B.layers,
    shrink: Annotated[int, Option(help="Divides all widths but the vocabulary.")] = 1,
    memory: Annotated[str, Option(help="The engine's limit.")] = "3.5GiB",
    samples: Annotated[int, Option(help="Calibration windows.")] = 2,
    seqlen: Annotated[int, Option(help="Tokens per window.")] = 64,
    eval_windows: Annotated[int, Option(help="Windows for perplexity.")] = 1,
    seed: Annotated[int, Option(help="Of weights, windows and the moments of kills.")] = 0,
    json: Annotated[Path | None, Option(help="File for the figures.")] = None,
) -> None:
    """Print a table for each part; all files are removed at the end, also after an error."""
    chosen = _checked_parts(parts)
    large, small = LLAMA_7B.shrunk(layers, shrink), LLAMA_1_3B.shrunk(layers, shrink)
    _check_disk(folder, large if chosen != ["plain"] else small)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an error, so that files go
    protocol = Protocol(memory, samples, seqlen, eval_windows, seed)
    figures: dict[str, Any] = {**conditions("float32"), "protocol": asdict(protocol)}
    try:
        if chosen != ["plain"]:
            with tempfile.TemporaryDirectory(dir=folder, prefix="prune-7b-") as work:
                _large_parts(Setting(large, Path(work).absolute(), protocol), chosen, figures)
        if "plain" in chosen:
            with tempfile.TemporaryDirectory(dir=folder, prefix="prune-7b-") as work:
                figures["plain"] = _plain(Setting(small, Path(work).absolute(), protocol))
    finally:
        write_json(json, figures)  # after an error, what was measured before it


def _checked_parts(parts: str) -> list[str]:
    chosen = parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise typer.BadParameter(f"parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    return chosen


def _check_disk(folder: Path, shape: Shape) -> None:
    """Say how much disk is needed, and refuse to begin with less."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = DISK_FACTOR * shape.size / 1e9, shutil.disk_usage(folder).free / 1e9
    text = f"needs up to {needed:.1f} GB of disk in {folder.absolute()}, {free:.1f} GB are free"
    _say(text)
    if needed > free:
        raise typer.BadParameter(text)


def _large_parts(setting: Setting, chosen: list[str], figures: dict[str, Any]) -> None:
    """Make the 7B shape once and run the parts on it; `figures` grows with each measurement."""
    figures["shape"], figures["made"] = asdict(setting.shape), setting.make()
    metrics: dict[str, Any] = {}
    if "7b" in chosen:
        figures["io_seconds"] = copy_seconds(setting.checkpoint, setting.work / "copy")
        _say(f"the disk alone: {figures['io_seconds']:.1f} s to read and write it once")
        figures["metrics"] = metrics
        for metric in METRICS:
            found = setting.pruned(metric)
            metrics[metric] = {**found, "io_ratio": found["seconds"] / figures["io_seconds"]}
        _show_metrics(setting, metrics, figures["io_seconds"])
    if "kill" in chosen:
        undisturbed = metrics.get(KILLED_METRIC) or setting.pruned(KILLED_METRIC)
        figures["kill"] = _kill(setting, undisturbed)
        _show_kill(figures["kill"])


def _kill(setting: Setting, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Kill a run twice and resume it each time; return its legs and whether its result is equal."""
    draw, left = random.Random(setting.protocol.seed), undisturbed["seconds"]
    moments = []
    for _ in range(2):
        moments.append(draw.uniform(*KILLED_BETWEEN) * left)
        left -= moments[-1]
    legs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as room:
        out = Path(room) / "out"
        for kill_after in (*moments, None):
            more = RESUME_OPTIONS if legs else []
            leg = setting.engine(out, [KILLED_METRIC], more, kill_after)
            legs.append({"kill_after": kill_after, "killed": leg.killed, **_figures(leg)})
            _say(f"{KILLED_METRIC}: {'killed' if leg.killed else 'ended'} at {leg.seconds:.1f} s")
            if not leg.killed:  # it may end before its second moment
                break
        outcome = _outcome(out)
    return {
        "undisturbed": undisturbed,
        "legs": legs,
        "sha256": outcome["sha256"],
        "equal": outcome["sha256"] == undisturbed["sha256"],
        "seconds": sum(leg["seconds"] for leg in legs),
    }


def _plain(setting: Setting) -> dict[str, Any]:
    """Measure the engine and the plain way on one checkpoint, and show them."""
    figures: dict[str, Any] = {"shape": asdict(setting.shape), "made": setting.make()}
    figures["engine"] = setting.pruned("mul(W, G)", "--group", "row")
    with tempfile.TemporaryDirectory(dir=setting.work) as room:
        out = Path(room) / "out"
        files = ["--model", str(setting.checkpoint), "--out", str(out)]
        script = str(ROOT / "benchmarks" / "plain_way.py")
        drop_cache(setting.checkpoint)
        command = [sys.executable, script, *files, *setting.protocol.windows()]
        measured = measure(command, Path(room) / "log.txt")
        figures["plain"] = {**_figures(measured), **_read_json(out / "perplexity.json")}
    engine, plain = figures["engine"], figures["plain"]
    figures["ratios"] = {
        "memory": engine["peak_rss_gib"] / plain["peak_rss_gib"],
        "time": engine["seconds"] / plain["seconds"],
    }
    figures["bars"] = BARS
    _show_plain(setting, figures)
    return figures


def _figures(measured: Measured) -> dict[str, float]:
    return {
        "seconds": measured.seconds,
        "peak_rss_gib": measured.peak_gib,
        "peak_rss_with_files_gib": measured.peak_with_files_gib,
    }


def _outcome(out: Path) -> dict[str, Any]:
    """Return what a result says of itself: one hash of its files, perplexities, time by part."""
    report = _read_json(out / "pruning_report.json")
    sums = _read_json(out / "pruning_recipe.json")["sha256"]
    lines = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    figures = {key: report[key] for key in ("dense_perplexity", "pruned_perplexity")}
    return {"sha256": sha256(lines.encode()).hexdigest(), **figures}


def _seconds_by_part(log: Path) -> dict[str, float]:
    """Return the seconds of each stage, from the lines that the engine ends it with."""
    ends = re.findall(r"^(.+): (\d+)/\2 \((\d+\.\d) s\)$", log.read_text(encoding="utf-8"), re.M)
    return {stage: float(seconds) for stage, _, seconds in ends}


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json_files.loads(path.read_text(encoding="utf-8"))
    return content


def _show_metrics(setting: Setting, metrics: dict[str, Any], io_seconds: float) -> None:
    rows = [
        [name, *_memory_and_time(found), f"{found['io_ratio']:.2f}", found["sha256"][:12]]
        for name, found in metrics.items()
    ]
    title = f"{_title(setting)}; read and written once in {io_seconds:.1f} s"
    show(title, ["metric", "GiB", "with files", "seconds", "of the disk's", "sha256"], rows)
    by_part = {name: found.get("seconds_by_part", {}) for name, found in metrics.items()}
    if any(by_part.values()):
        lines = [
            [name, ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())]
            for name, parts in by_part.items()
        ]
        show("the engine's own clock", ["metric", "seconds by part"], lines)


def _show_kill(figures: dict[str, Any]) -> None:
    rows = [["undisturbed", *_memory_and_time(figures["undisturbed"])]]
    for number, leg in enumerate(figures["legs"], 1):
        rows.append([f"{number}, {'killed' if leg['killed'] else 'ended'}", *_memory_and_time(leg)])
    rows.append(["all", "", "", f"{figures['seconds']:.1f}"])
    kills = sum(leg["killed"] for leg in figures["legs"])
    same = "the same files as" if figures["equal"] else "OTHER FILES than"
    title = f"{KILLED_METRIC}, killed {kills} times and resumed: {same} undisturbed"
    show(title, ["leg", "GiB", "with files", "seconds"], rows)


def _show_plain(setting: Setting, figures: dict[str, Any]) -> None:
    rows = []
    for name in ("engine", "plain"):
        found = figures[name]
        perplexities = [f"{found[f'{state}_perplexity']:.1f}" for state in ("dense", "pruned")]
        rows.append([name, *_memory_and_time(found), *perplexities])
    ratios = {name: f"{ratio:.3f}" for name, ratio in figures["ratios"].items()}
    rows.append(["engine / plain", ratios["memory"], "", ratios["time"], "", ""])
    rows.append(["bar", f"{BARS['memory']}", "", f"{BARS['time']}", "", ""])
    title = f"mul(W, G) per row, {_title(setting)}"
    show(title, ["way", "GiB", "with files", "seconds", "dense", "pruned"], rows)


def _memory_and_time(found: dict[str, Any]) -> list[str]:
    keys = ("peak_rss_gib", "peak_rss_with_files_gib")
    return [*(f"{found[key]:.2f}" for key in keys), f"{found['seconds']:.1f}"]


def _title(setting: Setting) -> str:
    shape, asked = setting.shape, setting.protocol
    return (
        f"{shape.layers} blocks of {shape.hidden}, {shape.size / 1e9:.1f} GB in bfloat16, limit "
        f"{asked.memory}, {asked.samples} windows of {asked.seqlen} tokens"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
