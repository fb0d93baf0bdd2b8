"""The cost of a candidate, and candidates decided per hour.

On the candidates of a real run, in this process, with one worker's threads:

- pruning in each kind of group, against forward with loss over one window;
- a step of a descent, against its own forward and backward pass;
- the driver's own work: breed, simplify, fingerprint, commit, journal;
- candidates decided per hour.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from real_run import RealRun
from rich.progress import track
from tables import conditions, show, write_json
from torch import Tensor
from transformers import PreTrainedModel

from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.masks import Group, Layer, Model, NOfM, Row, Target
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import linear_layers
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.stream import gradient_at_head
from prunevolve.search.descent import BATCH
from prunevolve.search.evaluator import Evaluator, Resident
from prunevolve.search.records import Candidate, Record
from prunevolve.search.run_folder import RunFolder

PRUNED = {"wanda": Row(), "magnitude": Layer(), "snip": Model(), "gblm": NOfM(2, 4)}
"""A metric and a group to time for each kind of group."""

WINDOW = "forward and loss, one window"

PRUNING_BAR = "0.50 of a window"
BARS = {"step_of_its_passes": "1.5", "driver_ms_per_candidate": "5", "candidates_an_hour": ""}


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a search.")],
    candidates: Annotated[int, typer.Option(help="Consecutive candidates to time.")] = 150,
    first: Annotated[
        int | None, typer.Option(help="First of them; default the middle of the run.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Print one table: the parts of an evaluation, and the rates."""
    real = RealRun(run)
    experiment = real.experiment
    evaluator = real.evaluator(experiment)
    driver, asked = replayed(real)
    start = len(real.records) // 2 if first is None else first
    chosen = real.records[start : start + candidates]
    figures: JsonObject = {
        "seconds": _parts(evaluator),
        "step_of_its_passes": _step_of_its_passes(evaluator),
        "fitness_tokens": sum(
            experiment.subjects[subject].tokens["fitness"].numel()
            for subject in experiment.subject_of
        ),
        "threads": torch.get_num_threads(),
        "driver_ms_per_candidate": 1000 * driver,
        "candidates_an_hour": 3600 / (driver + seconds_decided(evaluator, chosen, asked)),
    }
    _print(figures, f"{experiment.config.model}, {experiment.config.dtype}, run {run.name}", chosen)
    write_json(json, {**conditions(experiment.config.dtype), **figures})


def _print(figures: JsonObject, what: str, chosen: Sequence[Record]) -> None:
    window = figures["seconds"][WINDOW]
    rows: list[list[object]] = [
        [f"{name}, s", seconds, seconds / window, PRUNING_BAR * (name != WINDOW)]
        for name, seconds in figures["seconds"].items()
    ]
    rows += [[name, figures[name], "", bar] for name, bar in BARS.items()]
    title = (
        f"{what}: {len(chosen)} candidates from {chosen[0].index} on, {figures['threads']} "
        f"threads, {figures['fitness_tokens']} fitness tokens"
    )
    show(title, ["", "figure", "of a window", "bar"], rows)


@torch.inference_mode()
def _parts(evaluator: Evaluator) -> dict[str, float]:
    """Return the seconds of pruning in each kind of group, and of a window."""
    resident = evaluator.residents[0]
    # Scores are kept for the tasks of one metric, so another one comes between two timings.
    other = partial(_prune, resident, "wanda-root", Row())
    seconds = {
        f"prune in all, {group.name}": _best(partial(_prune, resident, name, group), other)
        for name, group in PRUNED.items()
    }
    return {**seconds, WINDOW: _best(lambda: resident.losses("fitness", 0, 1))}


def _step_of_its_passes(evaluator: Evaluator) -> float:
    """Return the median seconds of a descent's step on the first task, as a multiple of those of a
    forward and a backward pass on as many windows; in turns, as a machine's speed changes.
    """
    breeder, model = evaluator.experiment.breeder, evaluator.residents[0].store.model
    windows = evaluator.residents[0].tokens["descent"][:BATCH].to(model.device)
    candidate = Candidate(0, Criterion(breeder.core, breeder.group), "descent", (0,))
    with closing(evaluator.evaluating(candidate)) as steps:
        next(steps)  # warms up
        step, passes = partial(next, steps), partial(_passes, model, windows)
        turns = [(_seconds(step), _seconds(passes)) for _ in range(4)]
    return median(of_step for of_step, _ in turns) / median(of_passes for _, of_passes in turns)


def _passes(model: PreTrainedModel, windows: Tensor) -> None:
    """Go forward and backward, and drop each gradient once it is there."""
    with ExitStack() as stack:
        for layer in linear_layers(model).values():
            weight = layer.weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
            stack.callback(weight.register_post_accumulate_grad_hook(_drop).remove)
        states = model.base_model(input_ids=windows, use_cache=False)[0]
        at_head = [gradient_at_head(model, *x) for x in zip(windows, states.detach(), strict=True)]
        states.backward(torch.stack(at_head))


def _drop(live: Tensor) -> None:
    live.grad = None


def _prune(resident: Resident, name: str, group: Group) -> None:
    resident.restore()
    resident.prune(named_metric(name).metric, Target(0.5, group))


def replayed(real: RealRun) -> tuple[float, list[Candidate]]:
    """Replay the run with its own outcomes; return the driver's seconds each, and what it asks."""
    asked = []
    with tempfile.TemporaryDirectory() as folder:
        copy = RunFolder.create(Path(folder) / "run")
        began = time.perf_counter()
        evolution = real.evolution()
        for record, candidate in zip(real.records, evolution.ask(), strict=False):
            assert candidate.criterion == record.candidate.criterion
            asked.append(candidate)
            for committed in evolution.tell(candidate.index, record.outcome):
                copy.append(committed, {})
        seconds = time.perf_counter() - began
        copy.close()
    return seconds / len(real.records), asked


def seconds_decided(
    evaluator: Evaluator, chosen: Sequence[Record], asked: Sequence[Candidate]
) -> float:
    """Return a worker's seconds per candidate; those decided by the driver cost it none."""
    evaluator.evaluate(asked[chosen[0].index])  # warms up
    began = time.perf_counter()
    for record in track(chosen, "evaluating", transient=True):
        if record.outcome.tokens:
            evaluator.evaluate(asked[record.index])
    return (time.perf_counter() - began) / len(chosen)


def _best(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Return the shortest of five timings, each after what is not timed."""
    work()  # warms up
    timings = []
    for _ in range(5):
        before()
        timings.append(_seconds(work))
    return min(timings)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    typer.run(main)
