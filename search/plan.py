"""What a search will do and hold, from its config and models' shapes, before a weight is read."""

import math
import os
from collections.abc import Sequence

import torch

from prunevolve.configs.schema import Config
from prunevolve.pruning import memory
from prunevolve.pruning.models import DTYPES, UnloadedModel, resolve_model, shapes_of
from prunevolve.pruning.operators import MATRIX
from prunevolve.pruning.statistics import STATISTICS, TERMINALS
from prunevolve.search.breeding.factors import MAX_FACTORS
from prunevolve.search.descent import BATCH
from prunevolve.search.evolution import DESCENTS, FINALISTS
from prunevolve.search.experiment import DRAWN_LENGTH, Experiment, cut_text, resolve

_GAPS = 1.5
"""What a worker holds, as a multiple of what it needs: it keeps freed memory, which has gaps."""


def plan_of(config: Config) -> list[str]:
    """Return models, texts and work of a search, in lines; raises as `resolve`."""
    experiment, models, lines = resolve(config), [], []
    for subject in experiment.subjects:
        length = min(DRAWN_LENGTH, max(text.length for text in subject.texts["fitness"]))
        model = resolve_model(subject.model, subject.dtype, experiment.device, length)
        models.append(model)
        size = f"{model.shapes.num_parameters():,} parameters in {subject.dtype}"
        lines.append(f"model {subject.model}: {size}")
        for role, kinds in subject.texts.items():
            notes = [note for kind in kinds if (note := kind.check())]
            if not notes:
                notes = [f"{cut_text(role, kinds, model.tokenizer).tokens.numel():,} tokens"]
            lines += [f"text {role}: {note}" for note in notes]
    search, tasks = config.search, len(experiment.tasks_of("fitness"))
    measured = (1 + len(experiment.baselines)) * tasks
    parts = [f"one in {DESCENTS} a descent"] if experiment.breeder.descends else []
    parts += [f"none is begun after {search.hours:g} hours"] if search.hours else []
    loop = ", ".join([f"{search.candidates} candidates on {tasks} task{'s' * (tasks > 1)}", *parts])
    size, where = memory.text_of(_worker_size(experiment, models)), "cores"
    cores, devices = os.cpu_count() or 1, torch.cuda.device_count()
    number: object = config.ray.workers
    if number is None:
        number = cores // config.ray.cpus_per_worker
        if config.ray.gpus_per_worker:
            number, where = int(devices / config.ray.gpus_per_worker), "GPUs"
        if config.ray.address != "local":
            number = f"as many as the cluster has {where} for"
    return [
        *lines,
        f"plan: before the loop: statistics, then {measured} measurements of dense models and "
        "baselines",
        f"plan: the loop: {loop}",
        f"plan: after it: up to {work_after(experiment)} measurements, of finalists and the winner",
        f"plan: workers: {number}; each holds at most about {size}",
    ]


def work_after(experiment: Experiment) -> int:
    """Return how many measurements of a task's text follow the loop at most."""
    fitness, selection = (len(experiment.tasks_of(role)) for role in ("fitness", "selection"))
    finalists = FINALISTS + (MAX_FACTORS - 1) * experiment.breeder.descends
    yardsticks = (1 + len(experiment.baselines)) * selection
    report = (2 + len(experiment.baselines)) * len(experiment.tasks)
    return finalists * (fitness + selection) + yardsticks + report


def _worker_size(experiment: Experiment, models: Sequence[UnloadedModel]) -> int:
    """Return about what a worker holds at most, in bytes, with all its models.

    Beside weights, statistics and masked weights that is the work on one model: all scores of a
    metric, or a step of a descent, with the activations of its windows.
    """
    held = sum(_held(model, experiment) for model in models)
    work = max(_work(model, experiment) for model in models)
    return memory.LIBRARIES + int(_GAPS * (held + work))


def _held(model: UnloadedModel, experiment: Experiment) -> int:
    """Return a model's weights, its masked ones beside them, and its statistics, in bytes."""
    item, shapes = DTYPES[model.dtype].itemsize, [*shapes_of(model.shapes).values()]
    weights = sum(memory.block_sizes(model)) + memory.outside_size(model)
    matrix = 2 if experiment.config.low_memory else 4
    statistics = sum(
        (matrix if TERMINALS[name].shape == MATRIX else 4)
        * math.prod(TERMINALS[name].shape.sizes(*shape))
        for name in experiment.terminals & STATISTICS
        for shape in shapes
    )
    return weights + item * sum(map(math.prod, shapes)) + statistics


def _work(model: UnloadedModel, experiment: Experiment) -> int:
    """Return the larger of all scores of a metric and a step of a descent, in bytes."""
    item, sizes = DTYPES[model.dtype].itemsize, [*map(math.prod, shapes_of(model.shapes).values())]
    low_memory, blocks = experiment.config.low_memory, len(memory.block_sizes(model))
    of_block = item * memory.activations(model, backward=True)
    states = item * model.config.get_text_config().hidden_size * model.seqlen
    windows = BATCH * (blocks * states + of_block if low_memory else blocks * of_block)
    few = 4 * 8 * max(sizes)  # matrices of the largest layer
    scores = 0 if low_memory else 4 * sum(sizes)
    descent = (windows + memory.head_size(model)) * experiment.breeder.descends
    return max(scores, descent) + few
