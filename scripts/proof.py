"""Prove that two checkouts do the same: equal tensors of prunings, equal journals of searches.

Each checkout runs its own scripts in its own `.venv`, one after the other, without the hub. Nothing
of the project is imported here, so the code of the two may differ in any way.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

WINDOWS = "--samples 4 --seqlen 64 --eval-windows 2 --device cpu"
PYTHON = ".venv/bin/python"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
ENVIRONMENT["HF_HUB_OFFLINE"] = "1"
WIKITEXT2 = Path(__file__).resolve().parents[2] / "shared/data/wikitext2"
SMOLLM2, GEMMA3 = "{models}/smollm2-135m", "{models}/gemma3-270m"
TIGHT = "--max-memory least"  # stands for the least that the checkout accepts
MIXTURE = "--corpus {texts}/valid.tokens.txt --corpus {texts}/test.raw.txt --share 3 --share 1"
STATISTICS = "mul(mul(W, add(G, sqrt(X))), add(quot(V, H), mul(exp(add(D, I)), add(B, M))))"
PRUNINGS = {
    "magnitude": "embedded --metric magnitude",
    "wanda": "embedded --metric wanda",
    "wanda-layer": "embedded --metric wanda --group layer --sparsity 0.6",
    "wanda-model": "embedded --metric wanda --group model",
    "ria-full": "embedded --metric ria-full",
    "pruner-zero": "embedded --metric pruner-zero",
    "snip": "embedded --metric snip --sparsity 0.6",
    "directed": "embedded --metric directed-snip-wanda",
    "all-statistics": f"embedded --metric '{STATISTICS}' --group model",
    "wanda-2:4": "embedded --metric wanda --pattern 2:4",
    "directed-4:8": "embedded --metric directed-snip-wanda --pattern 4:8",
    "wanda-sequential": "embedded --metric wanda --propagation sequential",
    "snip-row-sequential": "embedded --metric snip --group row --propagation sequential",
    "sparsegpt": "embedded --metric sparsegpt",
    "sparsegpt-4:8": "embedded --metric sparsegpt --pattern 4:8",
    "fast": "embedded --recipe fast",
    "fast-2:4": "embedded --recipe fast --pattern 2:4",
    "best": "embedded --recipe best",
    "best-2:4": "embedded --recipe best --pattern 2:4",
    "wanda-swaps": "embedded --metric wanda --refine swaps",
    "wanda-owl": "embedded --metric wanda --allocation owl --sparsity 0.7",
    "wanda-sparsegpt": "embedded --metric wanda --update sparsegpt",
    "wanda-reconstruct": "embedded --metric wanda --update reconstruct",
    "wanda-bf16": "embedded --metric wanda --dtype bfloat16",
    "directed-tight": f"embedded --metric directed-snip-wanda {TIGHT}",
    "mixture": f"embedded --metric snip {MIXTURE}",
    "smollm2-snip-bf16": f"{SMOLLM2} --metric snip --dtype bfloat16",
    "smollm2-snip-tight": f"{SMOLLM2} --metric snip {TIGHT}",
    "smollm2-sequential-tight": f"{SMOLLM2} --metric wanda --propagation sequential {TIGHT}",
    "smollm2-owl-swaps": f"{SMOLLM2} --metric wanda --allocation owl --refine swaps:5",
    "smollm2-fast-bf16": f"{SMOLLM2} --recipe fast --dtype bfloat16",
    "smollm2-fast-2:4-tight": f"{SMOLLM2} --recipe fast --pattern 2:4 {TIGHT}",
    "smollm2-best-tight": f"{SMOLLM2} --recipe best {TIGHT}",
    "smollm2-mixture": f"{SMOLLM2} --metric pruner-zero {MIXTURE} --split '[:50%]' --split all",
    "gemma3-fast-bf16-tight": f"{GEMMA3} --recipe fast --dtype bfloat16 {TIGHT}",
}
"""What is pruned: the model and options of `run_prune.py`."""

SEARCHES = {
    "no-worker": (0, ()),
    "1-worker": (1, ()),
    "4-workers": (4, ()),
    "kills": (1, (20, 70, 120)),
}
"""Workers of each search, and the candidates after which its driver is killed."""
SIZES = {"calibration": 8, "fitness": 32, "selection": 8, "report": 8}
SETTINGS = [f"--set={text}.windows={number}" for text, number in SIZES.items()]
SETTINGS += [f"--set={text}.length=64" for text in SIZES]
SETTINGS += ["--set=search.candidates=150"]
FIELDS = ("index", "metric", "group", "outcome", "fitness", "fingerprint", "parents")
END_SECONDS = 60.0
"""Seconds in which the processes of a killed driver must be gone."""


class Failed(Exception):
    """A run did not do what it was started for."""


@dataclass(frozen=True)
class Made:
    """What a pruning made: sha256 by tensor, zeros by layer, and perplexities."""

    arguments: str
    streamed: bool
    seconds: float
    tensors: dict[str, str]
    zeros: dict[str, int]
    perplexities: dict[str, float]

    def difference(self, other: "Made") -> str:
        """Return what differs first, and how much of its kind does; empty if nothing does."""
        for kind in ("tensors", "zeros", "perplexities"):
            one, two = getattr(self, kind), getattr(other, kind)
            if names := [name for name in one | two if one.get(name) != two.get(name)]:
                return f"{len(names)} of {len(one | two)} {kind}, first {names[0]}"
        return ""


def compare_prunings(args: argparse.Namespace) -> bool:
    """Print what differs between prunings by two checkouts; return whether nothing does."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.check_output(describe, cwd=args.old, text=True).strip()
    kept = args.out / f"{commit}.json"
    known = json.loads(kept.read_text()) if kept.exists() and "dirty" not in commit else {}
    table = Table("pruning", "result", "streamed", "old, s", "new, s", title=f"old: {commit}")
    same = True
    for name in args.only:
        arguments = f"{PRUNINGS[name]} {WINDOWS}"
        words = shlex.split(arguments.format(models=args.models, texts=args.texts))
        if missing := [word for word in words if word[0] == "/" and not Path(word).exists()]:
            print(f"{name}: skipped, there is no {missing[0]}", flush=True)
            continue
        try:
            if known.get(name, {}).get("arguments") != arguments:
                known[name] = asdict(_prune(args.old, words, arguments, args.out))
                kept.write_text(json.dumps(known, indent=1))
            old, new = Made(**known[name]), _prune(args.new, words, arguments, args.out)
        except Failed as error:
            result, row = f"FAILED: {error}", ["", "", ""]
        else:
            difference = old.difference(new)
            result = f"DIFFERENT: {difference}" if difference else "same"
            streamed = [("no", "yes")[made.streamed] for made in (old, new)]
            row = [" / ".join(dict.fromkeys(streamed)), f"{old.seconds:.1f}", f"{new.seconds:.1f}"]
        same &= result == "same"
        print(f"{name}: {result}; {row[1]} s, {row[2]} s", flush=True)
        table.add_row(name, result, *row)
    Console(highlight=False, width=110).print(table)
    return same


def _prune(checkout: Path, words: list[str], arguments: str, out: Path) -> Made:
    """Prune in a checkout, and return what came of it; the files are deleted."""
    words = ["run_prune.py", "--model", *words, "--out"]
    with tempfile.TemporaryDirectory(dir=out) as place:
        result = Path(place) / "result"
        if "least" in words:
            where = words.index("least")
            words[where] = "1MiB"
            refusal = _run(checkout, [*words, str(result)]).stderr
            if not (least := re.search(r"at least ([\d.]+ ?[KMG]iB)", refusal)):
                raise Failed(f"no least memory in {refusal[-300:]!r}")
            words[where] = least[1]
        began = time.monotonic()
        run = _run(checkout, [*words, str(result)])
        seconds = time.monotonic() - began
        if run.returncode:
            raise Failed(f"{checkout} exits {run.returncode}: {run.stderr[-300:]}")
        report = json.loads((result / "pruning_report.json").read_text())
        return Made(
            arguments,
            "streamed" in run.stderr + run.stdout,
            seconds,
            dict(sorted(pair for file in result.glob("*.safetensors") for pair in _sums(file))),
            {layer["name"]: layer["zeros"] for layer in report["layers"]},
            {name: report[f"{name}_perplexity"] for name in ("dense", "pruned")},
        )


def _sums(file: Path) -> list[tuple[str, str]]:
    """Return name and sha256 of each tensor in a file."""
    sums = []
    for name, tensor in load_file(file).items():
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        sums.append((name, digest.hexdigest()))
    return sums


def compare_searches(args: argparse.Namespace) -> bool:
    """Print what differs within and between the searches of two checkouts; return whether nothing.

    Their folders stay, so that a difference can be looked at.
    """
    out = Path(tempfile.mkdtemp(prefix="searches-", dir=args.out))
    journals: dict[str, list[bytes]] = {"old": [], "new": []}
    same = True
    for side, checkout, more in (("old", args.old, args.old_set), ("new", args.new, [])):
        settings = [*SETTINGS, *(f"--set={setting}" for setting in more)]
        for name in args.only:
            began, folder = time.monotonic(), out / f"{side}-{name}"
            try:
                journals[side].append(_search(checkout, folder, settings, *SEARCHES[name]))
                equal = journals[side][-1] == journals[side][0]
                result = "same bytes" if equal else "DIFFERENT bytes from the first"
            except Failed as error:
                result = f"FAILED: {error}"
            same &= result == "same bytes"
            print(f"{side}, {name}: {result}; {time.monotonic() - began:.1f} s", flush=True)
    contents = [b"".join(journals[side][:1]) for side in ("old", "new")]
    old, new = ([json.loads(line) for line in content.splitlines()] for content in contents)
    fields = [field for field in FIELDS if all(field in record for record in (*old, *new))]
    difference = "" if old and len(old) == len(new) else f"{len(old)} and {len(new)} candidates"
    for number, (one, two) in enumerate(zip(old, new, strict=False)):
        for field in fields:
            if one[field] != two[field] and not difference:
                difference = f"candidate {number}, {field}: {one[field]} and {two[field]}"
    result = f"DIFFERENT: {difference}" if difference else "same"
    bytes_too = "same" if contents[0] == contents[1] else "different"
    print(f"old and new, {', '.join(fields)}: {result}; {bytes_too} bytes")
    return same and not difference


def _search(
    checkout: Path, folder: Path, settings: list[str], workers: int, kills: tuple[int, ...]
) -> bytes:
    """Search in a checkout, and return the journal."""
    journal, log = folder / "journal.jsonl", folder.with_suffix(".log")
    words = ["--out", str(folder), *settings, f"--set=ray.workers={workers}"]
    for lines in (*kills, None):
        with log.open("a") as text:
            command = [str(checkout / PYTHON), "run_search.py", *words]
            process = subprocess.Popen(
                command, cwd=checkout, env=ENVIRONMENT, stdout=text, stderr=text
            )
        while lines and (not journal.exists() or journal.read_bytes().count(b"\n") < lines):
            if process.poll() is not None:
                raise Failed(f"ended before line {lines}: {log.read_text()[-300:]}")
            time.sleep(0.02)
        if lines:
            _kill(process)
        words = ["--resume", str(folder)]
    if process.wait():
        raise Failed(f"exits {process.returncode}: {log.read_text()[-300:]}")
    return journal.read_bytes()


def _kill(driver: subprocess.Popen[bytes]) -> None:
    """Kill a driver, and wait until all that it started is gone."""
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(family, timeout=END_SECONDS)
    for process in left:
        process.kill()
    if left:
        raise Failed(f"{len(left)} processes are left {END_SECONDS:.0f} s after the driver's kill")


def _run(checkout: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script of a checkout to its end."""
    command = [str(checkout / PYTHON), *words]
    return subprocess.run(command, cwd=checkout, env=ENVIRONMENT, capture_output=True, text=True)


def main() -> None:
    """Compare; exit 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, compare, known in (
        ("prunings", compare_prunings, list(PRUNINGS)),
        ("searches", compare_searches, list(SEARCHES)),
    ):
        command = commands.add_parser(name, help=compare.__doc__)
        command.set_defaults(compare=compare, known=known)
        for side in ("old", "new"):
            command.add_argument(side, type=_path, help="a checkout with its .venv")
        command.add_argument("--out", type=_path, required=True, help="folder for results")
        if compare is compare_prunings:
            command.add_argument("--models", type=_path, required=True, help="folder of models")
            command.add_argument("--texts", type=_path, default=WIKITEXT2, help="WikiText-2")
        else:
            told = "KEY=VALUE for old alone, such as what new does without being told; repeatable"
            command.add_argument("--old-set", action="append", default=[], help=told)
        command.add_argument("--only", help=f"some of {','.join(known)}, with commas between")
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else args.known
    if unknown := set(args.only) - set(args.known):
        parser.error(f"unknown {min(unknown)}: give some of {', '.join(args.known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(not args.compare(args))


def _path(text: str) -> Path:
    return Path(text).resolve()


if __name__ == "__main__":
    main()
