"""How fast a model without some of its neurons is: prompt and generation, against the dense one.

Random weights in the shapes of a model, or of some blocks of LLaMA-7B, since values do not matter.
All widths are timed in turns, so that a slowdown of the machine affects all; memory is a process's
peak after both, each width in its own.
"""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.progress import track
from tables import conditions, show, write_json
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from prunevolve.pruning.masks import Neurons
from prunevolve.pruning.models import DTYPES, load_config, narrowed_config, width_key

SHARES = (0.0, 0.2, 0.4)  # of the neurons that are gone
PROMPT, GENERATED = 128, 16  # tokens
Timings = dict[tuple[float, int, str], list[float]]  # seconds by share, batch and what


def main(
    model: Annotated[
        list[str], typer.Option(help="Folder or hub id, or 7b for blocks of LLaMA-7B; repeatable.")
    ],
    blocks: Annotated[int, typer.Option(help="Of 7b.")] = 4,
    rounds: Annotated[int, typer.Option(help="Turns.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of weights and arithmetic.")] = "bfloat16",
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print the table."""
    figures: dict[str, object] = {}
    for name in model:
        shape = LlamaConfig(num_hidden_layers=blocks, intermediate_size=11008)
        config = shape if name == "7b" else load_config(name)
        models = {share: built(config, share, dtype) for share in SHARES}
        timings: Timings = {}
        for _ in track(range(rounds + 1), f"timing {name}", transient=True):
            for share, live in models.items():
                for batch in (1, 8):
                    for what, seconds in timed(live, batch).items():
                        timings.setdefault((share, batch, what), []).append(seconds)
        del models
        peaks = {share: peak_of(config, share, dtype) for share in SHARES}
        figures[name] = printed(f"{name}, {dtype}", timings, peaks)
    write_json(json, {**conditions(dtype), "models": figures})


def built(config: PretrainedConfig, share: float, dtype: str) -> PreTrainedModel:
    """Return a random model without a share of its neurons."""
    width = getattr(config.get_text_config(), width_key(config))
    narrow = narrowed_config(config, width - (Neurons().removed(width, share) if share else 0))
    return AutoModelForCausalLM.from_config(narrow, dtype=DTYPES[dtype]).eval()


@torch.no_grad()
def timed(model: PreTrainedModel, batch: int) -> dict[str, float]:
    """Return the seconds of a prompt and of a token after it, through the blocks."""
    tokens = torch.ones(batch, PROMPT, dtype=torch.long)
    body: Callable[..., object] = model.base_model
    began = time.perf_counter()
    cache = body(input_ids=tokens, use_cache=True).past_key_values  # type: ignore[attr-defined]
    prompt = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(GENERATED):
        body(input_ids=tokens[:, :1], use_cache=True, past_key_values=cache)
    return {"prompt": prompt, "token": (time.perf_counter() - began) / GENERATED}


def peak_of(config: PretrainedConfig, share: float, dtype: str) -> float:
    """Return a process's peak in GiB, that builds the model and runs it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (config, share, dtype))


def _peak(config: PretrainedConfig, share: float, dtype: str) -> float:
    timed(built(config, share, dtype), 1)
    # getrusage would say the parent's, if that is higher.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def printed(title: str, timings: Timings, peaks: dict[float, float]) -> dict[str, object]:
    """Print tokens a second, and how many times as fast as dense, round by round; return them."""
    rows, figures = [], {}
    for (share, batch, what), seconds in timings.items():
        tokens = batch * (PROMPT if what == "prompt" else 1)
        dense = timings[0.0, batch, what]
        # The first round warms up.
        faster = median(a / b for a, b in zip(dense[1:], seconds[1:], strict=True))
        rate = tokens / median(seconds[1:])
        figures[f"{share:.0%} {what} {batch}"] = {"tokens_a_second": rate, "faster": faster}
        rows.append([f"{share:.0%}", what, str(batch), f"{rate:,.1f}", f"{faster:.2f}"])
    heads = ["neurons gone", "what", "batch", "tokens a second", "times as fast"]
    memory = ", ".join(f"{share:.0%} {peak:.2f}" for share, peak in peaks.items())
    show(f"{title}; peak GiB by neurons gone: {memory}", heads, rows)
    return {"timings": figures, "peak_gib": {f"{share:.0%}": x for share, x in peaks.items()}}


if __name__ == "__main__":
    typer.run(main)
