"""The output of `run_search.py --validate`: the plan of a search on this machine.

Whatever a run would refuse before its first measurement is refused here, too; nothing is downloaded
and no weight is read.
"""

import json
import os
from collections.abc import Iterator

import torch
from pydantic import BaseModel

from configs.schema import ROLES, Config
from pruning import models
from pruning.baselines import BASELINES
from pruning.sizes import size_text
from search import trackers
from search.experiment import ResolvedConfig, resolve
from search.machine import check_cores, folder_of, memory_lines, workers_here
from search.population import FINALISTS


def plan_of(config: Config) -> list[str]:
    """Return the plan of a search in lines.

    Raises:
        ValueError: If a run would be refused; one line.
    """
    resolved = resolve(config)
    check_cores(config.ray)
    trackers.check(config.trackers)
    memory = memory_lines(resolved)
    here = resolved.read_texts_here()
    tokens = [
        {role: _tokens(resolved, here, subject, role) for role in ROLES}
        for subject in range(len(resolved.subjects))
    ]
    parameters = [_parameters(subject.model) for subject in resolved.subjects]
    return [
        *resolved.notes,
        *_model_lines(resolved, parameters),
        *_text_lines(resolved, tokens),
        *_task_lines(resolved),
        _worker_line(config),
        *memory,
        _evaluations_line(resolved),
        f"keys at their defaults: {', '.join(_defaults(config)) or 'none'}",
    ]


def _parameters(model: str) -> int | None:
    """Return a model's number of parameters, tied ones once; None if its config is not here."""
    folder = folder_of(model)
    if folder is None:
        return None
    skeleton = models.skeleton(models.load_config(folder), torch.float32)
    return sum(int(parameter.numel()) for parameter in skeleton.parameters())


def _tokens(
    resolved: ResolvedConfig, here: list[dict[str, int]], subject: int, role: str
) -> int | None:
    """Return the tokens in a text's windows; None if it is a whole text that is not here."""
    text = resolved.texts[subject][role]
    known = None if text.windows is None else text.windows * text.length
    return here[subject].get(role, known)


def _model_lines(resolved: ResolvedConfig, parameters: list[int | None]) -> Iterator[str]:
    for subject, count in zip(resolved.subjects, parameters, strict=True):
        if count is None:
            yield f"model {subject.model}: {subject.dtype}; its size is not known here"
        else:
            size = size_text(count * models.DTYPES[subject.dtype].itemsize)
            yield f"model {subject.model}: {count:,} parameters, {size} in {subject.dtype}"


def _text_lines(resolved: ResolvedConfig, tokens: list[dict[str, int | None]]) -> Iterator[str]:
    for subject, texts in enumerate(resolved.texts):
        of = f" of {resolved.subjects[subject].model}" if len(resolved.texts) > 1 else ""
        for role, text in texts.items():
            kinds = " + ".join(f"{part.corpus} {part.split}" for part in text.parts)
            count = tokens[subject][role]
            size = "all of it" if count is None else f"{count:,} tokens"
            yield f"text {role}{of}: {kinds}: {size}, windows of {text.length}"


def _task_lines(resolved: ResolvedConfig) -> Iterator[str]:
    for task in resolved.tasks:
        pattern = task.pattern.name if task.pattern else "unstructured"
        use = f"weight {task.weight:g}" if task.weight else "only to choose the winner"
        yield f"task {task.name}: {task.sparsity:.1%} zeros, {pattern}, {use}"


def _worker_line(config: Config) -> str:
    ray = config.ray
    share = f"{ray.cpus_per_worker} cores" if ray.cpus_per_worker > 1 else "1 core"
    if ray.gpus_per_worker:
        share += f" and {ray.gpus_per_worker:g} GPU"
    workers = workers_here(config)
    if workers is None:
        most = "as many as fit" if ray.workers is None else f"up to {ray.workers}"
        return f"workers: {most} on the cluster {ray.address!r}, {share} each"
    gpus = f" and {torch.cuda.device_count()} GPUs" if ray.gpus_per_worker else ""
    place = "in this process" if ray.workers == 0 else "here"
    return f"workers: {workers} {place}, {share} each, of {os.cpu_count()} cores{gpus}"


def _evaluations_line(resolved: ResolvedConfig) -> str:
    """Return the number of evaluations."""
    search = resolved.config.search
    named = len(BASELINES)
    finalists = min(FINALISTS, search.candidates)
    return (
        f"evaluations: {search.candidates} candidates and {named} named metrics on fitness, "
        f"{finalists} finalists and {named} on selection, 1 and {named} on report, for each of "
        f"{len(resolved.tasks)} {'task' if len(resolved.tasks) == 1 else 'tasks'}"
    )


def _defaults(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the keys that a config does not set, with their default values."""
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from _defaults(value, f"{prefix}{key}.")
        elif key not in section.model_fields_set:
            shown = json.dumps(value) if value is None or isinstance(value, bool) else value
            yield f"{prefix}{key}={shown}"
