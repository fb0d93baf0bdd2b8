"""One-shot pruning by `mul(W, G)` per row in the plain way: the whole model in memory at once.

It loads all weights in fp32, builds one graph over all blocks for each window, holds all gradients
and sums, sorts every row, and saves in bf16. `prune_7b.py` runs it in its own process, so that its
memory and time are measured like the engine's.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Option

from evaluation.corpus import token_windows
from evaluation.perplexity import perplexity, window_losses
from pruning.store import ResidentStore


def main(
    model: Annotated[Path, Option(help="A LLaMA-architecture folder.")],
    out: Annotated[Path, Option(help="New folder for the pruned model.")],
    corpus: Annotated[str, Option(help="Calibration text.")],
    split: Annotated[str, Option(help="Its split.")],
    samples: Annotated[int, Option(help="Calibration windows.")],
    seqlen: Annotated[int, Option(help="Tokens per window.")],
    seed: Annotated[int, Option(help="Seed for drawing calibration windows.")],
    eval_corpus: Annotated[str, Option(help="Text to measure perplexity on.")],
    eval_split: Annotated[str, Option(help="Its split.")],
    eval_windows: Annotated[int, Option(help="Number of its windows.")],
    sparsity: Annotated[float, Option(help="Fraction of every row to remove.")] = 0.5,
) -> None:
    """Measure, prune, measure again and save; write the perplexities to `perplexity.json`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = token_windows(tokenizer, corpus, split, samples, seqlen, seed).tokens
    test = token_windows(tokenizer, eval_corpus, eval_split, eval_windows, seqlen, None).tokens
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    layers = [layer for layer in loaded.model.layers.modules() if isinstance(layer, nn.Linear)]
    store = ResidentStore(loaded)
    dense = perplexity(window_losses(store, test))
    sums = _squared_gradients(loaded, layers, windows)
    _prune_rows(layers, sums, sparsity)
    pruned = perplexity(window_losses(store, test))
    loaded.to(torch.bfloat16).save_pretrained(out)
    text = json.dumps({"dense_perplexity": dense, "pruned_perplexity": pruned})
    (out / "perplexity.json").write_text(text + "\n", encoding="utf-8")


def _squared_gradients(model: nn.Module, layers: list[nn.Linear], windows: Tensor) -> list[Tensor]:
    """Return for each weight the sum over windows of (100 x gradient) squared."""
    model.requires_grad_(False)
    for layer in layers:
        layer.weight.requires_grad_(True)
    sums = [torch.zeros_like(layer.weight) for layer in layers]
    for window in windows:
        ids = window[None]
        model(input_ids=ids, labels=ids).loss.backward()
        for layer, total in zip(layers, sums, strict=True):
            assert layer.weight.grad is not None
            total += (100 * layer.weight.grad) ** 2
            layer.weight.grad = None
    return sums


@torch.no_grad()
def _prune_rows(layers: list[nn.Linear], sums: list[Tensor], sparsity: float) -> None:
    """Zero the weights with the lowest scores of every row; of equal scores, the leftmost first."""
    for layer, total in zip(layers, sums, strict=True):
        scores = layer.weight.abs() * total.sqrt()
        order = torch.sort(scores, dim=1, stable=True).indices
        layer.weight.scatter_(1, order[:, : int(layer.in_features * sparsity)], 0)


if __name__ == "__main__":
    typer.run(main)
