"""One-shot pruning by `mul(W, G)` per row in the plain way: the whole model in memory at once.

It loads all weights in fp32, builds one graph over all blocks for each window, holds all gradients
and sums, sorts every row, and saves in bf16. `prune_7b.py` runs it in its own process, so that its
memory and time are measured like the engine's: plain_way.py MODEL OUT OPTIONS-AS-JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunevolve.evaluation.corpus import token_windows
from prunevolve.evaluation.perplexity import perplexity, window_losses
from prunevolve.pruning.store import ResidentStore

SPARSITY = 0.5


def main(model: Path, out: Path, options: dict[str, str]) -> None:
    """Measure, prune, measure again and save; write the perplexities to `pruning_report.json`."""
    tokenizer, length = AutoTokenizer.from_pretrained(model), int(options["seqlen"])
    text, samples = (options["corpus"], options["split"]), int(options["samples"])
    windows = token_windows(tokenizer, *text, samples, length, int(options["seed"])).tokens
    text, samples = (options["eval-corpus"], options["eval-split"]), int(options["eval-windows"])
    test = token_windows(tokenizer, *text, samples, length, None).tokens
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.requires_grad_(False)
    layers = [layer for layer in loaded.model.layers.modules() if isinstance(layer, nn.Linear)]
    store = ResidentStore(loaded)
    dense = perplexity(window_losses(store, test))
    for layer in layers:
        layer.weight.requires_grad_(True)
    sums = [torch.zeros_like(layer.weight) for layer in layers]
    for window in windows:
        loaded(input_ids=window[None], labels=window[None]).loss.backward()
        for layer, total in zip(layers, sums, strict=True):
            assert layer.weight.grad is not None
            total += (100 * layer.weight.grad) ** 2
            layer.weight.grad = None
    with torch.no_grad():
        for layer, total in zip(layers, sums, strict=True):
            # Of equal scores the leftmost goes first.
            order = torch.sort(layer.weight.abs() * total.sqrt(), dim=1, stable=True).indices
            layer.weight.scatter_(1, order[:, : int(layer.in_features * SPARSITY)], 0)
    pruned = perplexity(window_losses(store, test))
    loaded.to(torch.bfloat16).save_pretrained(out)
    report = {"dense_perplexity": dense, "pruned_perplexity": pruned}
    (out / "pruning_report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
