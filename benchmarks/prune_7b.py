"""Memory and time of pruning a model of LLaMA-7B's shape, block by block, measured from outside.

Random weights are pruned by four metrics, each in its own process with a cold page cache: peak
memory, and seconds against what the disk alone needs to read the checkpoint and write it once. Time
and memory depend on shapes and files, not on what the weights have learnt. Linux only: memory is
read from /proc, and the page cache is dropped with posix_fadvise, which needs no privileges.
"""

import json as json_text
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import typer
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tables import ROOT, conditions, show, write_json
from transformers import LlamaConfig, LlamaForCausalLM
from typer import Option

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.model_name import EMBEDDED
from prunevolve.pruning.models import load_tokenizer

METRICS = ("magnitude", "wanda", "pruner-zero", "snip")

SHARD_BYTES = 10**9  # of weights in a file: a shard is in memory, and copied, when it is written
STD = 0.02  # of the weights, LLaMA's initializer range

PROTOCOL = {"max-memory": "3.5GiB", "samples": 2, "seqlen": 64, "eval-windows": 1, "seed": 0}
"""Options of every pruning."""

LLAMA_7B = {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32}


def main(
    blocks: Annotated[int, Option(help="Decoder blocks; a 7B model has 32.")] = 32,
    json: Annotated[Path | None, Option(help="File for the figures.")] = None,
) -> None:
    """Print a table; temporary files, up to 3 checkpoints (13.5 GB), are made and removed here."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which removes files
    shape = LLAMA_7B | {"layers": blocks}
    metrics: dict[str, JsonObject] = {}
    figures = {**conditions("float32"), "protocol": PROTOCOL, "shape": shape, "metrics": metrics}
    try:
        with tempfile.TemporaryDirectory(dir=".", prefix="prune-7b-") as temporary:
            work = Path(temporary).absolute()
            figures["gigabytes"] = make_checkpoint(shape, work / "dense") / 1e9
            figures["io_seconds"] = copy_seconds(work / "dense", work / "copy")
            for metric in METRICS:
                metrics[metric] = prune(work / "dense", metric)
                print(f"{metric}: {metrics[metric]['took']}", file=sys.stderr)
    finally:
        write_json(json, figures)  # after an error, the measurements before it
    _print(figures)


def prune(checkpoint: Path, metric: str) -> JsonObject:
    """Prune with a cold page cache, remove the resulting files, and return the figures."""
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        out, log = Path(folder) / "out", Path(folder) / "log.txt"
        command = [sys.executable, "run_prune.py", f"--model={checkpoint}", f"--out={out}"]
        command += [f"--metric={metric}", "--sparsity=0.5", "--dtype=float32"]
        command += [f"--{name}={value}" for name, value in PROTOCOL.items()]
        drop_cache(checkpoint)
        return {"took": measure(command, log), "sha256": _digest(out)}


def _print(figures: JsonObject) -> None:
    io_seconds, rows = figures["io_seconds"], []
    for metric, result in figures["metrics"].items():
        took = result["took"]
        row = [f"{took['peak_gib']:.2f}", f"{took['peak_with_files_gib']:.2f}"]
        row += [f"{took['seconds']:.1f}", f"{took['seconds'] / io_seconds:.2f}"]
        rows.append([metric, *row, result["sha256"][:12]])
    shape = figures["shape"]
    title = (
        f"{shape['layers']} blocks of {shape['hidden']} in bfloat16, limit {PROTOCOL['max-memory']}"
        f", {PROTOCOL['samples']} windows of {PROTOCOL['seqlen']} tokens; read and written once in "
        f"{io_seconds:.1f} s"
    )
    show(title, ["metric", "GiB", "with files", "seconds", "of the disk's", "sha256"], rows)


def make_checkpoint(shape: Mapping[str, int], folder: Path) -> int:
    """Write an untied LLaMA of random bf16 weights into a new folder; return its bytes.

    It has the same bytes each time, and the embedded model's tokenizer.
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
    config.save_pretrained(folder)
    load_tokenizer(EMBEDDED).save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: _random(empty[name].shape, generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json_text.dumps(index, indent=2))
    os.sync()
    return size


def _random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a bf16 matrix with a deviation of about `STD`, or ones for a norm.

    No two rows have the same scale, and no two matrices the same statistics.
    """
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scales = STD * (0.75 + 0.5 * torch.rand(shape[0], 1, generator=generator))
    scales *= 0.75 + 0.5 * torch.rand(1, generator=generator)
    return torch.randn(shape, generator=generator).mul_(scales).bfloat16()


def measure(command: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command in the project's root, with its output in a log, and watch its memory.

    Returns its seconds, and two peaks in GiB: of anonymous and shared memory, which is what it
    holds itself, and of resident memory, where mapped files count, too. Raises RuntimeError with
    the end of its output if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    peak = peak_with_files = 0
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                sizes = _memory_kib(process.pid)
                peak = max(peak, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
                peak_with_files = max(peak_with_files, sizes.get("VmHWM", 0))
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"code {process.returncode} of {command}: {log.read_text()[-2000:]}")
    return {
        "seconds": time.perf_counter() - began,
        "peak_gib": peak / 2**20,
        "peak_with_files_gib": peak_with_files / 2**20,
    }


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


def _digest(out: Path) -> str:
    """Return one hash of a result's files, computed from the checksums in its recipe."""
    recipe = json_text.loads((out / "pruning_recipe.json").read_text(encoding="utf-8"))
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(recipe["sha256"].items()))
    return sha256(lines.encode()).hexdigest()


if __name__ == "__main__":
    typer.run(main)
