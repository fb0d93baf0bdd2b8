"""Memory and time of pruning a model of LLaMA-7B's shape, block by block, measured from outside.

It makes random weights, and runs every pruning in its own process with a cold page cache:

- 7b: peak memory and seconds of four metrics, against the seconds that the disk alone needs to
  read the checkpoint and write it once;
- kill: two kills at random moments, each resumed; the result must be that of an undisturbed run;
- plain: on a 1.3B shape, the engine against the plain way with the whole model in memory.

Time and memory depend on shapes and files, not on what the weights have learnt. Linux only: memory
is read from /proc, and the page cache is dropped with posix_fadvise, which needs no privileges.
"""

import json as json_text
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tables import LOCAL_WIKITEXT2, ROOT, conditions, show, wikitext2_corpora, write_json
from transformers import LlamaConfig, LlamaForCausalLM
from typer import Option

from prunevolve.pruning.models import EMBEDDED, load_tokenizer

PARTS = ("7b", "kill", "plain")
METRICS = ("magnitude", "wanda", "pruner-zero", "snip")
KILLED_METRIC = "snip"

KILLED_BETWEEN = (0.15, 0.85)
"""Fractions of the remaining time between which a run is killed."""

BARS = {"memory": 0.25, "time": 1.6}
"""Highest acceptable ratio of the engine's memory and time to the plain way's."""

DISK_FACTOR = 4
"""Disk needed, in checkpoints: the dense one, a result, and an fp32 number per weight."""

SHARD_BYTES = 10**9
"""Largest file of weights, since a shard is in memory, and copied, when it is written."""

STD = 0.02
"""Standard deviation of the weights, LLaMA's initializer range."""

POLL_SECONDS = 0.02
"""Time between two readings of a process's memory."""

PROTOCOL = {"samples": 2, "seqlen": 64, "eval_windows": 1, "seed": 0}
"""Windows for calibration and for perplexity, their tokens, and the seed of all that is random."""

LLAMA_7B = {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32}
LLAMA_1_3B = {"hidden": 2048, "intermediate": 5504, "layers": 24, "heads": 16}


@dataclass(frozen=True)
class Took:
    """A process's time and memory.

    Attributes:
        seconds: From start to end.
        peak_gib: Highest sum of anonymous and shared memory read, in GiB. This is what the process
            itself holds: pages of mapped files, which the system can reclaim, are left out.
        peak_with_files_gib: Highest resident memory by the system's own count, in GiB.
        killed: Whether it was killed before it ended.
    """

    seconds: float
    peak_gib: float
    peak_with_files_gib: float
    killed: bool

    @property
    def cells(self) -> list[str]:
        """Its memory and time for a table."""
        return [f"{self.peak_gib:.2f}", f"{self.peak_with_files_gib:.2f}", f"{self.seconds:.1f}"]


@dataclass(frozen=True)
class Setting:
    """A checkpoint, the folder for it and all results, and the settings of every run."""

    shape: Mapping[str, int]
    work: Path
    memory: str

    @property
    def checkpoint(self) -> Path:
        return self.work / "dense"

    @property
    def title(self) -> str:
        return (
            f"{self.shape['layers']} blocks of {self.shape['hidden']} in bfloat16, limit "
            f"{self.memory}, {PROTOCOL['samples']} windows of {PROTOCOL['seqlen']} tokens"
        )

    def make(self) -> dict[str, float]:
        """Make the checkpoint, and return its size and the seconds that it took."""
        began = time.perf_counter()
        gigabytes = make_checkpoint(self.shape, self.checkpoint) / 1e9
        seconds = time.perf_counter() - began
        return {"gigabytes": gigabytes, "seconds": seconds}

    def engine(
        self, out: Path, metric: Sequence[str], more: Sequence[str], kill_after: float | None = None
    ) -> Took:
        """Run the engine with a cold page cache; `metric` is a metric's text and options for it."""
        fixed = ["--sparsity=0.5", "--dtype=float32", f"--max-memory={self.memory}"]
        fixed += [f"--{name}={value}" for name, value in options().items()]
        files = [f"--model={self.checkpoint}", f"--out={out}", "--metric", *metric]
        drop_cache(self.checkpoint)
        command = [sys.executable, "run_prune.py", *files, *fixed, *more]
        return measure(command, out.parent / "log.txt", kill_after)

    def pruned(self, *metric: str) -> dict[str, Any]:
        """Prune to the end, return the figures, and remove the resulting files."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            out = Path(folder) / "out"
            took = self.engine(out, metric, [])
            log = (out.parent / "log.txt").read_text(encoding="utf-8")
            # The engine's last progress line of each stage.
            ends = re.findall(r"^(.+): (\d+)/\2 \((\d+\.\d) s\)$", log, re.MULTILINE)
            parts = {stage: float(seconds) for stage, _, seconds in ends}
            figures = {"sha256": read_digest(out), "perplexity": read_perplexity(out)}
        print(f"{metric[0]}: {took.seconds:.1f} s, peak {took.peak_gib:.2f} GiB", file=sys.stderr)
        return {"took": took, **figures, "seconds_by_part": parts}


def main(
    parts: Annotated[str, Option(help=f"Comma-separated: {', '.join(PARTS)}.")] = ",".join(PARTS),
    folder: Annotated[Path, Option(help="Folder for the temporary files.")] = Path(),
    shrink: Annotated[int, Option(help="Divisor of all sizes except the vocabulary.")] = 1,
    memory: Annotated[str, Option(help="The engine's memory limit.")] = "3.5GiB",
    json: Annotated[Path | None, Option(help="File for the figures.")] = None,
) -> None:
    """Print a table for each part; all files are removed at the end, even after an error."""
    chosen = parts.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        raise typer.BadParameter(f"parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which removes files
    protocol = {"memory": memory, **PROTOCOL}
    figures: dict[str, Any] = {**conditions("float32"), "protocol": protocol}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for shape, wanted in ((LLAMA_7B, {"7b", "kill"}), (LLAMA_1_3B, {"plain"})):
            if not wanted & set(chosen):
                continue
            shrunk = {name: size // shrink for name, size in shape.items()}
            with tempfile.TemporaryDirectory(dir=folder, prefix="prune-7b-") as work:
                setting = Setting(shrunk, Path(work).absolute(), memory)
                if "plain" in wanted:
                    figures["plain"] = _plain(setting)
                else:
                    _large_parts(setting, chosen, figures)
    finally:
        write_json(json, figures)  # after an error, the measurements before it


def _large_parts(setting: Setting, chosen: list[str], figures: dict[str, Any]) -> None:
    """Make the 7B shape once and run the parts on it; `figures` grows with each measurement."""
    figures |= {"shape": dict(setting.shape), "made": setting.make()}
    results: dict[str, dict[str, Any]] = {}
    if "7b" in chosen:
        io_seconds = copy_seconds(setting.checkpoint, setting.work / "copy")
        figures |= {"io_seconds": io_seconds, "metrics": {}}
        for metric in METRICS:
            result = results[metric] = setting.pruned(metric)
            result["io_ratio"] = result["took"].seconds / io_seconds
            figures["metrics"][metric] = {**result, "took": asdict(result["took"])}
        rows = []
        for name, result in results.items():
            parts = [f"{part} {took:.1f}" for part, took in result["seconds_by_part"].items()]
            row = [name, *result["took"].cells, f"{result['io_ratio']:.2f}", ", ".join(parts)]
            rows.append([*row, result["sha256"][:12]])
        heads = ["metric", "GiB", "with files", "seconds", "of the disk's", "by part", "sha256"]
        show(f"{setting.title}; read and written once in {io_seconds:.1f} s", heads, rows)
    if "kill" in chosen:
        undisturbed = results.get(KILLED_METRIC) or setting.pruned(KILLED_METRIC)
        figures["kill"] = _kill(setting, undisturbed)


def _kill(setting: Setting, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Kill a run twice, resume it each time, and compare its files with the undisturbed run's."""
    rng, remaining = random.Random(PROTOCOL["seed"]), undisturbed["took"].seconds
    moments: list[float | None] = []
    for _ in range(2):
        moment = rng.uniform(*KILLED_BETWEEN) * remaining
        remaining -= moment
        moments.append(moment)
    legs: list[dict[str, Any]] = []
    rows = [["undisturbed", *undisturbed["took"].cells]]
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        out = Path(folder) / "out"
        for kill_after in (*moments, None):
            took = setting.engine(out, [KILLED_METRIC], ["--resume"] * bool(legs), kill_after)
            legs.append({"kill_after": kill_after, "took": asdict(took)})
            rows.append([f"{len(legs)}, {'killed' if took.killed else 'ended'}", *took.cells])
            if not took.killed:  # it may end before its second kill
                break
        digest = read_digest(out)
    equal = digest == undisturbed["sha256"]
    same = "the same files as" if equal else "OTHER FILES than"
    title = f"{KILLED_METRIC}, killed and resumed: {same} the undisturbed run"
    show(title, ["leg", "GiB", "with files", "seconds"], rows)
    seconds = sum(leg["took"]["seconds"] for leg in legs)
    return {"legs": legs, "sha256": digest, "equal": equal, "seconds": seconds}


def _plain(setting: Setting) -> dict[str, Any]:
    """Measure the engine and the plain way on one checkpoint, and show them."""
    made = setting.make()
    engine = setting.pruned("mul(W, G)", "--group", "row")
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        out = Path(folder) / "out"
        drop_cache(setting.checkpoint)
        script = str(ROOT / "benchmarks" / "plain_way.py")
        words = [str(setting.checkpoint), str(out), json_text.dumps(options())]
        command = [sys.executable, script, *words]
        took = measure(command, Path(folder) / "log.txt")
        plain: dict[str, Any] = {"took": took, "perplexity": read_perplexity(out)}
    ratios = {
        "memory": engine["took"].peak_gib / took.peak_gib,
        "time": engine["took"].seconds / took.seconds,
    }
    ways = {"engine": engine, "plain": plain}
    rows = [
        [name, *way["took"].cells, *(f"{value:.1f}" for value in way["perplexity"].values())]
        for name, way in ways.items()
    ]
    rows.append(["ratio", f"{ratios['memory']:.3f}", "", f"{ratios['time']:.3f}", "", ""])
    rows.append(["bar", f"{BARS['memory']}", "", f"{BARS['time']}", "", ""])
    heads = ["way", "GiB", "with files", "seconds", "dense", "pruned"]
    show(f"mul(W, G) per row, {setting.title}", heads, rows)
    figures = {name: {**way, "took": asdict(way["took"])} for name, way in ways.items()}
    return {"shape": dict(setting.shape), "made": made, **figures, "ratios": ratios, "bars": BARS}


def options() -> dict[str, str]:
    """Return the options for texts and windows, shared by the engine and the plain way."""
    corpora, splits = ("embedded", "embedded"), ("calibration", "report")
    if LOCAL_WIKITEXT2.is_dir():
        corpora, splits = wikitext2_corpora(), ("all", "all")
    texts = {"corpus": corpora[0], "split": splits[0]}
    texts |= {"eval-corpus": corpora[1], "eval-split": splits[1]}
    return texts | {name.replace("_", "-"): str(value) for name, value in PROTOCOL.items()}


def make_checkpoint(shape: Mapping[str, int], folder: Path, disk: float = DISK_FACTOR) -> int:
    """Write an untied LLaMA of random bf16 weights into a new folder; return its bytes.

    It has the same bytes each time. No two rows have the same scale, no two matrices the same
    statistics, and the norms are 1. The tokenizer is the embedded model's.

    Args:
        disk: Free space that is asked for, in checkpoints.

    Raises:
        BadParameter: If the disk has less.
    """
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    size = int(sum(tensor.nbytes for tensor in empty.values()))
    needed, free = disk * size / 1e9, shutil.disk_usage(folder.parent).free / 1e9
    if needed > free:
        text = f"needs up to {needed:.1f} GB of disk in {folder.parent}, {free:.1f} GB are free"
        raise typer.BadParameter(text)
    config.save_pretrained(folder)
    load_tokenizer(EMBEDDED).save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)
    generator = torch.Generator().manual_seed(PROTOCOL["seed"])
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _random(empty[name].shape, generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json_text.dumps(index, indent=2))
    os.sync()
    return size


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a bf16 matrix with a deviation of about `STD`, or ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scales = STD * (0.75 + 0.5 * torch.rand(shape[0], 1, generator=generator))
    scales *= 0.75 + 0.5 * torch.rand(1, generator=generator)
    return torch.randn(shape, generator=generator).mul_(scales).bfloat16()


def measure(command: Sequence[str], log: Path, kill_after: float | None = None) -> Took:
    """Run a command in the project's root and watch its memory.

    Args:
        command: A program and its arguments.
        log: File to which its output is appended.
        kill_after: Seconds after which it is killed with SIGKILL; None lets it end.

    Raises:
        RuntimeError: If its exit code is not 0; the message has the end of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    peak = peak_with_files = 0
    with log.open("ab") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                sizes = _memory_kib(process.pid)
                peak = max(peak, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
                peak_with_files = max(peak_with_files, sizes.get("VmHWM", 0))
                if kill_after is not None and time.perf_counter() - began >= kill_after:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            if killed := process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.perf_counter() - began
    if process.returncode and not killed:
        raise RuntimeError(f"code {process.returncode} of {command}: {log.read_text()[-2000:]}")
    return Took(seconds, peak / 2**20, peak_with_files / 2**20, killed)


def _memory_kib(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status by name, in KiB; empty if the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    fields = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(size) for name, size, _ in fields}


def drop_cache(folder: Path) -> None:
    """Ask the system to drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(folder: Path, copy: Path) -> float:
    """Return the seconds to read a folder's files and write them once, with a cold page cache."""
    drop_cache(folder)
    began = time.perf_counter()
    shutil.copytree(folder, copy)
    os.sync()
    seconds = time.perf_counter() - began
    shutil.rmtree(copy)
    drop_cache(folder)
    return seconds


def read_digest(out: Path) -> str:
    """Return one hash of a result's files, computed from the checksums in its recipe."""
    recipe = json_text.loads((out / "pruning_recipe.json").read_text(encoding="utf-8"))
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(recipe["sha256"].items()))
    return sha256(lines.encode()).hexdigest()


def read_perplexity(out: Path) -> dict[str, float]:
    """Return a result's perplexities before and after pruning, from its report."""
    report = json_text.loads((out / "pruning_report.json").read_text(encoding="utf-8"))
    return {part: report[f"{part}_perplexity"] for part in ("dense", "pruned")}


if __name__ == "__main__":
    typer.run(main)
