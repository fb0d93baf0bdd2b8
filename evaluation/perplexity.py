"""Perplexity of a causal language model on token windows, and what a report says of it.

A window of T tokens has T - 1 predictions. Its mean NLL is over those, and the perplexity of N
equally long windows is exp of the mean of the N means. (The mean of the windows' perplexities
would be a different, larger number.)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunevolve.evaluation.windows import Windows

Report = dict[str, Any]  # a JSON object


@torch.inference_mode()
def window_losses(
    states: Iterable[Tensor],
    logits: Callable[[Tensor], Iterable[Tensor]],
    windows: Tensor,
    on_window: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return each window's mean NLL in nats per predicted token, (N,), fp64 on the CPU.

    Args:
        states: What enters the head for each window, (T, hidden_size).
        logits: Makes logits of states, (tokens, vocabulary) in fp32, some tokens' at a time: a
            batch's would dwarf everything else in memory.
        windows: Token ids, (N, T) with T of 2 or more.
        on_window: Called with the number of windows done.
    """
    losses = []
    for done, (hidden, window) in enumerate(zip(states, windows, strict=True), 1):
        targets, start = window[1:].to(hidden.device), 0
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in logits(hidden[:-1]):
            end = start + len(part)
            total += functional.cross_entropy(part, targets[start:end], reduction="sum")
            start = end
        losses.append(total.item() / len(targets))
        on_window(done)
    return torch.tensor(losses, dtype=torch.float64)


def perplexity(losses: Tensor) -> float:
    """Return exp of the mean of per-window losses in nats per token; inf if that overflows."""
    mean = losses.mean().item()
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_error(losses: Tensor) -> float | None:
    """Return the standard error of `perplexity`; None for a single window.

    By the delta method it is exp's slope at the mean loss times the standard error of that.
    """
    if len(losses) < 2:
        return None
    return perplexity(losses) * (losses.std().item() / math.sqrt(len(losses)))


def measured(losses: Mapping[str, Tensor], windows: Windows, dtype: str) -> Report:
    """Return what a report says of perplexity, from each window's mean NLL by name.

    Behind each is its standard error. What is not finite is None.
    """

    def of(part: Tensor) -> Report:
        values: dict[str, float | None] = {}
        for name, loss in losses.items():
            values[name] = perplexity(loss[part])
            values[f"{name}_standard_error"] = perplexity_error(loss[part])
        return {x: y if y is not None and math.isfinite(y) else None for x, y in values.items()}

    kinds = torch.tensor(windows.kinds)
    by_text = []
    for kind, part in enumerate(windows.parts):
        shown = {name.replace("_perplexity", ""): x for name, x in of(kinds == kind).items()}
        by_text.append({"corpus": part["corpus"], "split": part["split"], **shown})
    source = {**windows.provenance, "dtype": dtype}
    return {**of(kinds >= 0), "perplexity_of": source, "by_text": by_text}


def not_finite(losses: Mapping[str, Tensor], windows: Windows, dtype: str) -> list[str]:
    """Return a warning for each model with windows whose loss is not finite."""
    lines = []
    for name, values in losses.items():
        if bad := torch.nonzero(~values.isfinite()).flatten().tolist():
            text = windows.parts[windows.kinds[bad[0]]]
            first = f"first window {bad[0] + 1} ({text['corpus']}, split {text['split']})"
            problem = f"is not finite in {dtype}: {len(bad)} windows are not, {first}"
            lines.append(f"{name.replace('_', ' ')} {problem}; give another --dtype")
    return lines


def lines(report: Report) -> list[str]:
    """Return what `measured` returns as text: perplexities, of each text if there are several."""
    source = f"{source_of(report['perplexity_of'])}, {report['perplexity_of']['dtype']}"
    names = [name for name in report if name.endswith("perplexity")]
    width = max(map(len, names))
    lines = [f"{x.replace('_', ' '):{width}} {_number(report, x)} ({source})" for x in names]
    for text in report["by_text"] if len(report["by_text"]) > 1 else []:
        names = [name for name in ("perplexity", "dense", "pruned") if name in text]
        values = ", ".join(f"{name} {_number(text, name)}" for name in names)
        lines.append(f"  of {Path(text['corpus']).name}, split {text['split']}: {values}")
    return lines


def source_of(provenance: Report) -> str:
    """Say where windows come from; of local files the names alone."""
    corpora = [Path(corpus).name for corpus in provenance["corpus"].split(" + ")]
    words = "split {split}, {windows} windows of {length} = {tokens} tokens"
    return f"{' + '.join(corpora)}, {words.format_map(provenance)}"


def _number(report: Report, name: str) -> str:
    value, error = report[name], report.get(f"{name}_standard_error")
    shown = "not finite" if value is None else f"{value:.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"
