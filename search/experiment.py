"""Everything that a search needs, resolved once from its config: tasks, texts, seeds, settings.

Whatever a run would refuse before its first measurement is refused here, without reading a weight;
of a model from the hub no more is read than config and tokenizer.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path

import torch

from prunevolve.configs.schema import ROLES, Config, Ray, Task
from prunevolve.evaluation.windows import (
    Provenance,
    Text,
    Windows,
    check_disjoint,
    cut_all,
    share_windows,
    special_note,
)
from prunevolve.pruning.baselines import BASELINES
from prunevolve.pruning.masks import Target, group_of, parse_pattern
from prunevolve.pruning.models import DTYPES, load_config, load_tokenizer, pinned, skeleton
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.statistics import LEAF_SETS
from prunevolve.search.breeding.variation import Breeder, read_seeds
from prunevolve.search.resident import Subject

_LEAST_LAG, _GOOD_LAG = 4, 16
"""Lags for each worker: with less than the first they wait for one another; with the second 95%
work though one evaluation in ten takes ten times as long."""


@dataclass(frozen=True)
class Experiment:
    """What a config asks for, in plain values, so that it also builds a worker.

    Attributes:
        config: The config, with its seeds as texts, so that it depends on no other file.
        tasks: The tasks of a candidate, then those of weight 0, which only choose the winner.
        subjects: The models with their texts, which are there after `read_texts`.
        subject_of: The index of each task's model.
        leaves: The statistics that candidates, seeds and baselines may use.
        breeder: Makes the candidates.
        device: A torch device.
        notes: What could not be checked before the texts are read, one line each.
        warnings: Reasons to trust the statistics less.
    """

    config: Config
    tasks: tuple[Task, ...]
    subjects: tuple[Subject, ...]
    subject_of: tuple[int, ...]
    leaves: frozenset[str]
    breeder: Breeder
    device: str = "cpu"
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def read_texts(self) -> "Experiment":
        """Return the experiment with its windows; raise ValueError if a text is unavailable."""
        subjects = [replace(subject, windows=_cut(subject, ROLES)) for subject in self.subjects]
        warnings = [
            f"{subject.model}: {note}"
            for subject in subjects
            if (note := special_note(subject.tokens["calibration"], load_tokenizer(subject.model)))
        ]
        return replace(self, subjects=tuple(subjects), warnings=tuple(warnings))

    @property
    def weights(self) -> list[float]:
        """The weight of each task in the fitness; they add up to 1."""
        weights = [task.weight for task in self.tasks if task.weight]
        return [weight / sum(weights) for weight in weights]

    def tasks_of(self, role: str) -> list[int]:
        """Return the tasks that are measured on a text when metrics are compared.

        On the selection text those of weight 0, if there are any; else those that have a weight.
        """
        chosen = [i for i, task in enumerate(self.tasks) if role == "selection" and not task.weight]
        return chosen or [i for i, task in enumerate(self.tasks) if task.weight]

    def kinds_of(self, task: int, role: str) -> tuple[str, ...]:
        """Return each window's kind of text: its corpus, and its split if two share a corpus."""
        windows = self.subjects[self.subject_of[task]].windows[role]
        corpora = [Path(str(part["corpus"])).name for part in windows.parts]
        names = [
            f"{corpus} {part['split']}" if corpora.count(corpus) > 1 else corpus
            for corpus, part in zip(corpora, windows.parts, strict=True)
        ]
        return tuple(names[kind] for kind in windows.kinds)

    def target(self, task: int, group: str) -> Target:
        """Return a task's target for a comparison group; an n:m pattern has its own."""
        pattern = parse_pattern(self.tasks[task].pattern)
        return Target(self.tasks[task].sparsity, pattern or group_of(group))

    def provenance(self, subject: int) -> dict[str, Provenance]:
        """Return the origin of a model's windows, by role."""
        windows = self.subjects[subject].windows
        return {role: text.provenance for role, text in windows.items()}

    def task_rows(self) -> list[dict[str, object]]:
        """Return the tasks as JSON: name, model, sparsity, pattern, weight."""
        keys = {"model", "sparsity", "pattern", "weight"}
        return [{"name": task.name, **task.model_dump(include=keys)} for task in self.tasks]

    def origin(self, **more: object) -> dict[str, object]:
        """Return what is needed to reproduce a result; the same for any number of workers."""
        config = self.config
        found = {
            "models": list(dict.fromkeys(subject.model for subject in self.subjects)),
            "removed": list(dict.fromkeys(task.removed for task in self.tasks)),
        }
        tasks = {"tasks": self.task_rows()} if len(self.tasks) > 1 else {}
        return {
            "found": found,
            "model": config.model,
            "dtype": config.dtype,
            "pruning": config.pruning.model_dump(),
            "texts": self.provenance(0),
            **tasks,
            "seed": config.search.seed,
            "candidates": config.search.candidates,
            **more,
        }


def pinned_config(config: Config) -> Config:
    """Return a config in which hub models have the commit that they are at, for any later resume.

    Raises:
        ValueError: If the config of one cannot be downloaded, or it is not supported.
    """
    tasks = [task.model_copy(update={"model": pinned(task.model)}) for task in config.tasks]
    models = {"model": [pinned(model) for model in config.selection.model]}
    selection = config.selection.model_copy(update=models)
    update = {"model": pinned(config.model), "tasks": tasks, "selection": selection}
    return config.model_copy(update=update)


def resolve(config: Config) -> Experiment:
    """Check as much of a config as is cheap to check, and resolve it.

    Raises:
        ValueError: If a run would be refused; one line.
    """
    tasks = _all_tasks(config)
    patterned = all(task.pattern != "unstructured" for task in tasks)
    group = "row" if patterned else config.pruning.group  # an n:m pattern has its own
    seeds = tuple(read_seeds(config.search.seeds, group))
    asked = [Subject(task.model, task.dtype, _texts(task)) for task in tasks]
    subjects = [subject for place, subject in enumerate(asked) if subject not in asked[:place]]
    notes = _check_texts(subjects, config.allow_test_selection)
    _check_models(tasks)
    _check_machine(config)
    named = [*seeds, *(baseline.criterion for baseline in BASELINES.values())]
    drawn = frozenset(LEAF_SETS[config.search.primitives])
    search = config.search.model_copy(update={"seeds": [criterion.text for criterion in seeds]})
    return Experiment(
        config=config.model_copy(update={"search": search}),
        tasks=tasks,
        subjects=tuple(subjects),
        subject_of=tuple(map(subjects.index, asked)),
        leaves=drawn.union(*(criterion.metric.leaves for criterion in named)),
        breeder=Breeder(search, group, seeds),
        device="cuda" if config.ray.gpus_per_worker else "cpu",
        notes=tuple(notes),
    )


def _all_tasks(config: Config) -> tuple[Task, ...]:
    """Return the config's tasks, and one of weight 0 for each target on each model of selection."""
    own = {role: getattr(config, role) for role in ROLES} | {"dtype": config.dtype, "weight": 0.0}
    targets = {(task.sparsity, task.pattern): task for task in config.tasks}
    choosing = [
        task.model_copy(update={**own, "model": model})
        for model in config.selection.model
        for task in targets.values()
    ]
    return (*config.tasks, *choosing)


def _texts(task: Task) -> dict[str, tuple[Text, ...]]:
    """Return the kinds of text of a task, by role."""
    texts = {}
    for role, config in task.texts.items():
        kinds = [
            Text(corpus, split, config.windows, config.length, config.seed, config.bos)
            for corpus, split in zip(config.corpus, config.split, strict=True)
        ]
        with _naming(role):
            texts[role] = share_windows(kinds, config.share or [1.0] * len(kinds))
    return texts


def _cut(subject: Subject, roles: Iterable[str]) -> dict[str, Windows]:
    """Return the windows of a model's texts by role."""
    tokenizer, windows = load_tokenizer(subject.model), {}
    for role in roles:
        with _naming(role):
            windows[role] = cut_all(subject.texts[role], tokenizer)
    return windows


@contextmanager
def _naming(role: str) -> Iterator[None]:
    """Let an error inside the context name the text's role."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


def _check_texts(subjects: Sequence[Subject], may_overlap: bool) -> list[str]:
    """Check texts without a network; return a line for each that needs the hub.

    Raises:
        ValueError: If a text is unknown, missing or malformed, or two of them overlap.
    """
    notes = []
    for role, kinds in (item for subject in subjects for item in subject.texts.items()):
        with _naming(role):
            notes += [f"{role}: {note}" for kind in kinds if (note := kind.check())]
    for one, other, role in product(subjects, subjects, ROLES):
        # Each role of a model's texts against the other roles of every model's.
        overlaps = check_disjoint({**other.texts, role: one.texts[role]})
        if overlaps and not may_overlap:
            raise ValueError(
                f"{overlaps[0]}: give disjoint texts, or set allow_test_selection: true"
            )
    return list(dict.fromkeys(notes))


def _check_models(tasks: Sequence[Task]) -> None:
    """Check each task against its model, but for the weights of hub models."""
    for task in tasks:
        model = load_config(task.model)
        limit = model.get_text_config().max_position_embeddings
        for role, text in task.texts.items():
            if text.length > limit:
                rule = f"at most the model's {limit} positions"
                raise ValueError(f"{role}.length must be {rule}, got {text.length}")
        if pattern := parse_pattern(task.pattern):
            check_layers(skeleton(model, DTYPES[task.dtype]), Target(task.sparsity, pattern))


def _check_machine(config: Config) -> None:
    ray, cores = config.ray, os.cpu_count() or 1
    if (ray.workers == 0 or ray.address == "local") and ray.cpus_per_worker > cores:
        raise ValueError(
            f"ray.cpus_per_worker = {ray.cpus_per_worker} is more than the {cores} cores of this "
            f"machine: give at most {cores}"
        )
    if config.tensorboard:
        import_module("tensorboard")  # or it would be missed only after the statistics


# The plan of `run_search.py --validate`


def plan_of(config: Config) -> list[str]:
    """Return the plan of a search in lines; raises ValueError if a run would be refused."""
    experiment = resolve(config)
    lines = [*experiment.notes, *_subject_lines(experiment)]
    for task in experiment.tasks:
        use = f"{config.search.candidates:,} candidates, weight {task.weight:g}"
        if not task.weight:
            use = "only to choose the winner"
        lines.append(f"task {task.name}: {task.sparsity:.1%} zeros, {task.pattern}, {use}")
    lines.append(_worker_line(config.ray))
    workers = _workers_here(config.ray) or config.ray.workers or 0
    if warning := lag_warning(config.search.lag, workers):
        lines.append(f"warning: {warning}")
    return lines


def lag_warning(lag: int, workers: int) -> str:
    """Return what is wrong with a lag for so many workers; empty if nothing is."""
    if workers < 2 or lag >= _LEAST_LAG * workers:
        return ""
    return (
        f"search.lag = {lag} is small for {workers} workers, which will wait for one another: in a "
        f"new run set search.lag={_GOOD_LAG * workers}, {_GOOD_LAG} for each; see docs/CLUSTER.md"
    )


def _subject_lines(experiment: Experiment) -> Iterator[str]:
    """Yield each model and its texts, with the tokens of those that need no hub."""
    for subject in experiment.subjects:
        model = skeleton(load_config(subject.model), DTYPES[subject.dtype])
        yield f"model {subject.model}: {model.num_parameters():,} parameters in {subject.dtype}"
        texts = subject.texts.items()
        cut = _cut(subject, [role for role, kinds in texts if not any(k.check() for k in kinds)])
        for role, kinds in texts:
            names = " + ".join(f"{kind.corpus} {kind.split}" for kind in kinds)
            size = f"{cut[role].tokens.numel():,} tokens" if role in cut else "not counted"
            yield f"text {role}: {names}: {size}, windows of {kinds[0].length}"


def _worker_line(ray: Ray) -> str:
    share = f"{ray.cpus_per_worker} cores" if ray.cpus_per_worker > 1 else "1 core"
    if ray.gpus_per_worker:
        share += f" and {ray.gpus_per_worker:g} GPU"
    if workers := _workers_here(ray):
        return f"workers: {workers} here, {share} each, of {os.cpu_count()} cores"
    most = "as many as fit" if ray.workers is None else f"up to {ray.workers}"
    return f"workers: {most} on the cluster {ray.address!r}, {share} each"


def _workers_here(ray: Ray) -> int | None:
    """Return how many workers this machine will have; None if they run on a cluster."""
    if ray.workers == 0:
        return 1
    if ray.address != "local":
        return None
    if ray.gpus_per_worker:
        room = max(1, int(torch.cuda.device_count() // ray.gpus_per_worker))
        return min(ray.workers or room, room)
    return ray.workers or max(1, (os.cpu_count() or 1) // ray.cpus_per_worker)
