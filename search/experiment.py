"""Everything that a search needs, resolved once from its config: tasks, texts, seeds, settings.

Whatever a run would refuse before its first measurement is refused here, without reading a weight;
of a model from the hub no more is read than config and tokenizer.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunevolve.configs.schema import MOST_TOKENS, ROLES, Config, Task, naming
from prunevolve.evaluation.windows import (
    Text,
    Windows,
    check_disjoint,
    cut_all,
    share_windows,
    special_note,
)
from prunevolve.pruning.baselines import BASELINES, NEURON_BASELINES, SPARSEGPT
from prunevolve.pruning.masks import Target, group_of, pattern_group
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import DTYPES, load_config, load_tokenizer, pinned, skeleton
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding.variation import Breeder, read_seeds

SEEDED_BY_METHOD = (
    "seed sparsegpt is its score alone, W² / H: a search measures metrics without an update"
)

DRAWN, DRAWN_LENGTH = 512, 256
"""Windows of the fitness texts among which each step of a descent draws some, and their tokens."""


@dataclass(frozen=True)
class Subject:
    """A model to prune, and its texts by role: calibration, fitness, selection, report."""

    model: str  # `embedded`, a folder or a hub id
    dtype: str  # of its forward passes
    texts: Mapping[str, Sequence[Text]]  # by role, each kind of text
    windows: Mapping[str, Windows] = field(default_factory=dict)  # empty before `read_texts`

    @property
    def tokens(self) -> dict[str, Tensor]:
        """Token ids of its windows by role, each (N, T); `descent` has those that steps draw."""
        return {role: windows.tokens for role, windows in self.windows.items()}


@dataclass(frozen=True)
class Experiment:
    """What a config asks for, in plain values, so that it also builds a worker."""

    config: Config  # with its seeds as texts, so that it depends on no other file
    tasks: tuple[Task, ...]  # of a candidate, then those of weight 0, which only choose the winner
    subjects: tuple[Subject, ...]
    subject_of: tuple[int, ...]  # the index of each task's model
    baselines: Mapping[str, Criterion]  # by name; the best is the unit of fitness
    terminals: frozenset[str]  # the statistics that candidates, seeds and baselines may use
    breeder: Breeder
    device: str = "cpu"
    warnings: tuple[str, ...] = ()  # after `read_texts` with reasons to trust statistics less

    def read_texts(self) -> "Experiment":
        """Return the experiment with its windows; raise ValueError if a text is unavailable."""
        subjects, warnings = [], [*self.warnings]
        for subject in self.subjects:
            tokenizer = load_tokenizer(subject.model)
            windows = {role: cut_text(role, x, tokenizer) for role, x in subject.texts.items()}
            kinds = subject.texts["fitness"]
            drawn = [
                replace(x, windows=DRAWN // len(kinds), length=min(DRAWN_LENGTH, x.length), seed=0)
                for x in kinds
            ]
            windows["descent"] = cut_text("fitness", drawn, tokenizer)
            subjects.append(replace(subject, windows=windows))
            if note := special_note(windows["calibration"].tokens, tokenizer):
                warnings.append(f"{subject.model}: {note}")
        return replace(self, subjects=tuple(subjects), warnings=tuple(warnings))

    def tasks_of(self, role: str) -> list[int]:
        """Return the tasks that are measured on a text when metrics are compared.

        On the selection text those of weight 0, if there are any; else those that have a weight.
        """
        chosen = [i for i, task in enumerate(self.tasks) if role == "selection" and not task.weight]
        return chosen or [i for i, task in enumerate(self.tasks) if task.weight]

    def kinds_of(self, task: int, role: str) -> tuple[str, ...]:
        """Return each window's kind of text: its corpus, and its split if two share a corpus."""
        windows = self.subjects[self.subject_of[task]].windows[role]
        parts = [(Path(str(part["corpus"])).name, part["split"]) for part in windows.parts]
        differ = len({corpus for corpus, _ in parts}) == len(parts)
        names = [corpus if differ else f"{corpus} {split}" for corpus, split in parts]
        return tuple(names[kind] for kind in windows.kinds)

    def target(self, task: int, group: str) -> Target:
        """Return a task's target for a comparison group; a pattern has its own."""
        own = pattern_group(self.tasks[task].pattern, group)
        return Target(self.tasks[task].sparsity, own or group_of(group))

    def task_rows(self) -> list[dict[str, object]]:
        """Return the tasks as JSON: name, model, sparsity, pattern, weight."""
        keys = {"model", "sparsity", "pattern", "weight"}
        return [{"name": task.name, **task.model_dump(include=keys)} for task in self.tasks]

    def origin(self, **more: object) -> dict[str, object]:
        """Return what is needed to reproduce a result; the same for any number of workers."""
        config = self.config
        return {
            "model": config.model,
            "dtype": config.dtype,
            "pruning": config.pruning.model_dump(),
            "texts": {role: w.provenance for role, w in self.subjects[0].windows.items()},
            "tasks": self.task_rows(),
            "seed": config.search.seed,
            "candidates": config.search.candidates,
            **more,
        }


def pinned_config(config: Config) -> Config:
    """Return a config in which hub models have the commit that they are at, for a later resume."""
    tasks = [task.model_copy(update={"model": pinned(task.model)}) for task in config.tasks]
    models = {"model": [pinned(model) for model in config.selection.model]}
    selection = config.selection.model_copy(update=models)
    update = {"model": pinned(config.model), "tasks": tasks, "selection": selection}
    return config.model_copy(update=update)


def resolve(config: Config) -> Experiment:
    """Resolve a config; raise ValueError, of one line, if a run would be refused."""
    tasks = _all_tasks(config)
    n_of_m = all(":" in task.pattern for task in tasks)
    group = "row" if n_of_m else config.pruning.group  # an n:m pattern has its own
    neurons = all(task.pattern == "neurons" for task in tasks)
    baselines = {name: named_metric(name) for name in (NEURON_BASELINES if neurons else BASELINES)}
    seeds = tuple(read_seeds(config.search.seeds, group))
    of_tasks = [Subject(task.model, task.dtype, _texts(task)) for task in tasks]
    subjects = [subject for i, subject in enumerate(of_tasks) if subject not in of_tasks[:i]]
    for subject, other, role in product(subjects, subjects, ROLES):
        texts = {**other.texts, role: subject.texts[role]}
        if not config.allow_test_selection and (overlaps := check_disjoint(texts)):
            rule = "give disjoint texts, or set allow_test_selection: true"
            raise ValueError(f"{overlaps[0]}: {rule}")
    _check_tasks(tasks, config.search.stages)
    ray, cores, devices = config.ray, os.cpu_count() or 1, torch.cuda.device_count()
    if ray.address == "local" and ray.cpus_per_worker > cores:
        rule = f"at most the {cores} cores of this machine"
        raise ValueError(f"ray.cpus_per_worker must be {rule}, got {ray.cpus_per_worker}")
    if ray.address == "local" and ray.gpus_per_worker > devices:
        rule = f"at most the {devices} GPUs of this machine"
        raise ValueError(f"ray.gpus_per_worker must be {rule}, got {ray.gpus_per_worker:g}")
    if config.tensorboard:
        import_module("tensorboard")  # or it would be missed only after the statistics
    search = config.search.model_copy(update={"seeds": [criterion.text for criterion in seeds]})
    breeder = Breeder(search, group, seeds)
    names, used = breeder.terminals, [*seeds, *baselines.values()]
    if not set(names) <= TERMINALS.keys() or len(set(names)) < len(names) or "W" not in names:
        rule = f"must be of {', '.join(TERMINALS)}, each once and W among them"
        raise ValueError(f"search.terminals {rule}, got {', '.join(names)}")
    return Experiment(
        config=config.model_copy(update={"search": search}),
        tasks=tasks,
        subjects=tuple(subjects),
        subject_of=tuple(map(subjects.index, of_tasks)),
        baselines=baselines,
        terminals=frozenset(names).union(*(criterion.metric.terminals for criterion in used)),
        breeder=breeder,
        device="cuda" if ray.gpus_per_worker else "cpu",
        warnings=(SEEDED_BY_METHOD,) * (SPARSEGPT in config.search.seeds),
    )


def _all_tasks(config: Config) -> tuple[Task, ...]:
    """Return the config's tasks, and one of weight 0 for each target on each model of selection."""
    shared = {role: getattr(config, role) for role in ROLES}
    shared |= {"dtype": config.dtype, "weight": 0.0}
    targets = {(task.sparsity, task.pattern): task for task in config.tasks}
    choosing = [
        task.model_copy(update={**shared, "model": model})
        for model in config.selection.model
        for task in targets.values()
    ]
    return (*config.tasks, *choosing)


def _texts(task: Task) -> dict[str, tuple[Text, ...]]:
    """Return the kinds of text of a task, by role; checked, but for those from the hub."""
    texts = {}
    for role, config in task.texts.items():
        kinds = [
            Text(corpus, split, config.windows, config.length, config.seed, config.bos)
            for corpus, split in zip(config.corpus, config.split, strict=True)
        ]
        with naming(role):
            for kind in kinds:
                kind.check()
            texts[role] = share_windows(kinds, config.share or [1.0] * len(kinds))
    return texts


def cut_text(role: str, kinds: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Return the windows of a role's kinds of text; an error names the role."""
    with naming(role):
        return cut_all(kinds, tokenizer)


def _check_tasks(tasks: Sequence[Task], stages: Sequence[int]) -> None:
    """Check each task against the stages and its model, but for the weights of hub models."""
    for task in tasks:
        model = load_config(task.model)
        limit = model.get_text_config().max_position_embeddings
        for role, text in task.texts.items():
            if text.length > limit:
                rule = f"at most the model's {limit} positions"
                raise ValueError(f"{role}.length must be {rule}, got {text.length}")
        if stages and task.weight and stages[0] > (task.fitness.windows or MOST_TOKENS):
            rule = f"begin with at most the {task.fitness.windows} windows of fitness, or be []"
            raise ValueError(f"search.stages must {rule}; got {stages}")
        if group := pattern_group(task.pattern, None):
            check_layers(skeleton(model, DTYPES[task.dtype]), Target(task.sparsity, group))
