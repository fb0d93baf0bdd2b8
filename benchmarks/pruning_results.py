"""Results of prunings run as processes: files, perplexities, time and memory, as tables."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from measured import Measured
from tables import show

BARS = {"memory": 0.25, "time": 1.6}
"""Highest acceptable ratio of the engine's memory and time to the plain way's."""


@dataclass(frozen=True)
class Perplexity:
    """A model's perplexity before and after pruning."""

    dense: float
    pruned: float

    @staticmethod
    def read(path: Path) -> "Perplexity":
        """Read it from a report."""
        report = json.loads(path.read_text(encoding="utf-8"))
        return Perplexity(report["dense_perplexity"], report["pruned_perplexity"])


@dataclass(frozen=True)
class Result:
    """A completed pruning.

    Attributes:
        took: Time and memory.
        sha256: One hash of all its files.
        perplexity: From its own report.
        seconds_by_part: From the engine's own clock.
    """

    took: Measured
    sha256: str
    perplexity: Perplexity
    seconds_by_part: Mapping[str, float]


@dataclass(frozen=True)
class Leg:
    """A part of a run, killed after some seconds or run to the end."""

    kill_after: float | None
    took: Measured


@dataclass(frozen=True)
class Kills:
    """A run that was killed and resumed, and an undisturbed one."""

    undisturbed: Result
    legs: Sequence[Leg]
    sha256: str

    @property
    def equal(self) -> bool:
        """Whether both produced the same files."""
        return self.sha256 == self.undisturbed.sha256

    @property
    def seconds(self) -> float:
        """Seconds of all legs."""
        return sum(leg.took.seconds for leg in self.legs)


def read_digest(out: Path) -> str:
    """Return one hash of a result's files, computed from the checksums in its recipe."""
    recipe = json.loads((out / "pruning_recipe.json").read_text(encoding="utf-8"))
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(recipe["sha256"].items()))
    return sha256(lines.encode()).hexdigest()


def read_seconds(log: Path) -> dict[str, float]:
    """Return the seconds of each stage, from the engine's last progress line of each."""
    ends = re.findall(r"^(.+): (\d+)/\2 \((\d+\.\d) s\)$", log.read_text(encoding="utf-8"), re.M)
    return {stage: float(seconds) for stage, _, seconds in ends}


def show_metrics(title: str, results: Mapping[str, Result], io_seconds: float) -> None:
    """Show each metric's figures, and the seconds by part."""
    rows = [
        [
            *(name, *_memory_and_time(result.took)),
            *(f"{result.took.seconds / io_seconds:.2f}", result.sha256[:12]),
        ]
        for name, result in results.items()
    ]
    title = f"{title}; read and written once in {io_seconds:.1f} s"
    show(title, ["metric", "GiB", "with files", "seconds", "of the disk's", "sha256"], rows)
    lines = [
        [name, ", ".join(f"{part} {took:.1f}" for part, took in result.seconds_by_part.items())]
        for name, result in results.items()
    ]
    if any(result.seconds_by_part for result in results.values()):
        show("the engine's own clock", ["metric", "seconds by part"], lines)


def show_kills(metric: str, kills: Kills) -> None:
    """Show the legs of a killed run, and whether its files are those of the undisturbed one."""
    rows = [["undisturbed", *_memory_and_time(kills.undisturbed.took)]]
    for number, leg in enumerate(kills.legs, 1):
        end = "killed" if leg.took.killed else "ended"
        rows.append([f"{number}, {end}", *_memory_and_time(leg.took)])
    rows.append(["all", "", "", f"{kills.seconds:.1f}"])
    count = sum(leg.took.killed for leg in kills.legs)
    same = "the same files as" if kills.equal else "OTHER FILES than"
    title = f"{metric}, killed {count} times and resumed: {same} the undisturbed run"
    show(title, ["leg", "GiB", "with files", "seconds"], rows)


def show_ways(
    title: str, ways: Mapping[str, tuple[Measured, Perplexity]], ratios: Mapping[str, float]
) -> None:
    """Show two ways of doing the same pruning, and the ratios of their figures."""
    rows = [
        [name, *_memory_and_time(took), f"{perplexity.dense:.1f}", f"{perplexity.pruned:.1f}"]
        for name, (took, perplexity) in ways.items()
    ]
    shares = [f"{ratios['memory']:.3f}", "", f"{ratios['time']:.3f}", "", ""]
    rows.append([" / ".join(ways), *shares])
    rows.append(["bar", f"{BARS['memory']}", "", f"{BARS['time']}", "", ""])
    show(title, ["way", "GiB", "with files", "seconds", "dense", "pruned"], rows)


def _memory_and_time(took: Measured) -> list[str]:
    return [f"{took.peak_gib:.2f}", f"{took.peak_with_files_gib:.2f}", f"{took.seconds:.1f}"]
