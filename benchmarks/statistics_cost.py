"""The time that the sums G, M and X add to the forward and backward passes.

The same walk over blocks runs with sums that add nothing and with the real ones, one after the
other, so that both see the same machine. Both compute the weights' gradients.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from tables import conditions, show, write_json
from torch import Tensor, nn

from evaluation.corpus import token_windows
from pruning.checkpoint import open_checkpoint
from pruning.folder_store import FolderStore
from pruning.leaves import LEAVES, Leaf, Seen
from pruning.memory import keep_freed_memory
from pruning.models import EMBEDDED, load_config, load_tokenizer
from pruning.walk import collect

MEASURED = ("G", "M", "X")
BAR = 0.25


class _Nothing:
    """A sum that adds nothing."""

    def __init__(self, layer: nn.Linear) -> None:
        pass

    def add(self, values: Tensor, rows: slice) -> None:
        pass

    def result(self, seen: Seen) -> Tensor:
        return torch.zeros(1, 1)


def main(
    model: Annotated[str, typer.Option(help="A LLaMA-architecture folder or hub id.")],
    windows: Annotated[int, typer.Option(help="Calibration windows.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    dtype: Annotated[str, typer.Option(help="Dtype of the passes.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Runs of each case; the fastest counts.")] = 2,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    keep_freed_memory()
    store = FolderStore(open_checkpoint(model), load_config(model), dtype)
    tokens = token_windows(
        load_tokenizer(model), EMBEDDED, "calibration", windows, length, 0
    ).tokens
    empty = {name: replace(leaf, start=_Nothing) for name, leaf in LEAVES.items() if leaf.start}
    passes = min(_seconds(store, tokens, empty) for _ in range(rounds))
    seconds = {"passes alone": passes}
    for leaves in (("X",), ("G",), ("M",), MEASURED):
        real = {name: LEAVES[name] for name in leaves}
        fastest = min(_seconds(store, tokens, empty | real) for _ in range(rounds))
        seconds["passes and " + ", ".join(leaves)] = fastest
    rows = [[name, f"{value:.1f}", f"{value / passes - 1:+.1%}"] for name, value in seconds.items()]
    title = f"{model}, {windows} windows of {length} tokens, {dtype}; bar for all: +{BAR:.0%}"
    show(title, ["what", "seconds", "added"], rows)
    figures = {"windows": windows, "length": length, "seconds": seconds}
    write_json(json, {**conditions(dtype), **figures})


def _seconds(store: FolderStore, tokens: Tensor, leaves: Mapping[str, Leaf]) -> float:
    with patch.dict(LEAVES, leaves):
        began = time.perf_counter()
        collect(store, tokens, frozenset(MEASURED))
        return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
