"""Everything that a search needs, resolved once from its config: tasks, texts, seeds, settings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prunevolve.configs.schema import ROLES, Config
from prunevolve.configs.schema import Task as TaskConfig
from prunevolve.configs.schema import Text as TextConfig
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
from prunevolve.pruning.masks import Target, parse_pattern
from prunevolve.pruning.models import (
    DTYPES,
    load_config,
    load_tokenizer,
    pinned,
    skeleton,
)
from prunevolve.pruning.pruner import check_layers
from prunevolve.pruning.statistics import LEAF_SETS
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.checkpoint import read_seeds
from prunevolve.search.fitness import Setup, Task
from prunevolve.search.resident import Subject


@dataclass(frozen=True)
class Experiment:
    """What a config asks for; without windows until its texts are read.

    Attributes:
        config: The config, with its seeds as texts, so that it depends on no other file.
        subjects: The models.
        texts: The four texts of each model, by role.
        tasks: The tasks of a candidate; the report leads with the first.
        leaves: The leaves that candidates, seeds and baselines may use.
        breeder: Makes the candidates.
        notes: What could not be checked before the texts are read, one line each.
        windows: The texts of each model as tokens, by role.
        warnings: Reasons to trust the statistics less.
    """

    config: Config
    subjects: tuple[Subject, ...]
    texts: tuple[Mapping[str, TextConfig], ...]
    tasks: tuple[Task, ...]
    leaves: frozenset[str]
    breeder: Breeder
    notes: tuple[str, ...]
    windows: tuple[Mapping[str, Windows], ...] = ()
    warnings: tuple[str, ...] = ()

    def read_texts(self) -> "Experiment":
        """Return the experiment with its windows; raise ValueError if a text is unavailable."""
        windows, warnings = [], []
        for subject, texts in zip(self.subjects, self.texts, strict=True):
            tokenizer = load_tokenizer(subject.model)
            windows.append(_cut(tokenizer, _texts(texts)))
            if note := special_note(windows[-1]["calibration"].tokens, tokenizer):
                warnings.append(f"{subject.model}: {note}")
        return replace(self, windows=tuple(windows), warnings=tuple(warnings))

    def count_tokens_here(self) -> list[dict[str, int]]:
        """Cut the texts that need no hub; return each model's token counts, by role.

        Raises:
            ValueError: If one of them is unavailable, or shorter than its windows.
        """
        counts: list[dict[str, int]] = []
        for subject, texts in zip(self.subjects, self.texts, strict=True):
            all_texts = _texts(texts).items()
            local = {r: ts for r, ts in all_texts if not any(text.check() for text in ts)}
            cut = _cut(load_tokenizer(subject.model), local) if local else {}
            counts.append({role: windows.tokens.numel() for role, windows in cut.items()})
        return counts

    @property
    def weights(self) -> list[float]:
        """The weight of each task in the fitness; they add up to 1."""
        weights = [task.weight for task in self.tasks if task.weight]
        return [weight / sum(weights) for weight in weights]

    def task_rows(self) -> list[dict[str, object]]:
        """Return the tasks as JSON: name, model, sparsity, pattern, weight."""
        return [
            {
                "name": task.name,
                "model": self.subjects[task.subject].model,
                "sparsity": task.sparsity,
                "pattern": task.pattern.name if task.pattern else "unstructured",
                "weight": task.weight,
            }
            for task in self.tasks
        ]

    @property
    def setup(self) -> Setup:
        """The values that workers are built from."""
        search, ray = self.config.search, self.config.ray
        return Setup(
            subjects=self.subjects,
            windows=tuple(
                {role: windows.tokens for role, windows in texts.items()} for texts in self.windows
            ),
            tasks=self.tasks,
            leaves=self.leaves,
            device="cuda" if ray.gpus_per_worker else "cpu",
            threads=ray.cpus_per_worker,
            stages=tuple(search.stages),
            low_memory=self.config.low_memory,
            kinds=tuple(
                {role: _kinds_of(windows) for role, windows in texts.items()}
                for texts in self.windows
            ),
        )

    def provenance(self, subject: int) -> dict[str, Provenance]:
        """Return the origin of a model's windows, by role."""
        return {role: windows.provenance for role, windows in self.windows[subject].items()}

    def origin(self, **more: object) -> dict[str, object]:
        """Return what is needed to reproduce a result; the same for any number of workers."""
        config = self.config
        found = {
            "models": list(dict.fromkeys(subject.model for subject in self.subjects)),
            "removed": list(dict.fromkeys(task.removed for task in self.config.all_tasks)),
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
    tasks = [
        task.model_copy(update={"model": pinned(task.model)}) if task.model else task
        for task in config.tasks
    ]
    models = {"model": [pinned(model) for model in config.selection.models]}
    selection = config.selection.model_copy(update=models)
    update = {"model": pinned(config.model), "tasks": tasks, "selection": selection}
    return config.model_copy(update=update)


def resolve(config: Config) -> Experiment:
    """Check as much of a config as is cheap to check, and resolve it.

    Raises:
        ValueError: If something is wrong; one line that names it.
    """
    group = _group_of(config)
    seeds = tuple(read_seeds(config.search.seeds, group))
    notes = _check_texts(config)
    _check_models(config)
    sources: list[tuple[Subject, dict[str, TextConfig]]] = []
    tasks = []
    for task in config.all_tasks:
        source = (Subject(task.model, task.dtype), task.texts)
        if source not in sources:
            sources.append(source)
        pattern = parse_pattern(task.pattern)
        subject = sources.index(source)
        tasks.append(Task(task.name, subject, task.sparsity, pattern, task.weight))
    named = [*seeds, *(baseline.criterion for baseline in BASELINES.values())]
    drawn = frozenset(LEAF_SETS[config.search.primitives])
    search = config.search.model_copy(update={"seeds": [criterion.text for criterion in seeds]})
    return Experiment(
        config=config.model_copy(update={"search": search}),
        subjects=tuple(subject for subject, _ in sources),
        texts=tuple(texts for _, texts in sources),
        tasks=tuple(tasks),
        leaves=drawn.union(*(criterion.metric.leaves for criterion in named)),
        breeder=Breeder(search, group, seeds),
        notes=tuple(dict.fromkeys(notes)),
    )


def _kinds_of(windows: Windows) -> tuple[str, ...]:
    """Return each window's kind of text: its corpus, and its split if two share a corpus."""
    corpora = [Path(str(part["corpus"])).name for part in windows.parts]
    names = [
        f"{corpus} {part['split']}" if corpora.count(corpus) > 1 else corpus
        for corpus, part in zip(corpora, windows.parts, strict=True)
    ]
    return tuple(names[kind] for kind in windows.kinds)


def _texts(configs: Mapping[str, TextConfig]) -> dict[str, tuple[Text, ...]]:
    """Return the kinds of text to cut, by role."""
    texts = {}
    for role, config in configs.items():
        kinds = [
            Text(part.corpus, part.split, config.windows, config.length, config.seed, config.bos)
            for part in config.parts
        ]
        with _naming(role):
            texts[role] = share_windows(kinds, [part.share for part in config.parts])
    return texts


def _cut(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[Text]]
) -> dict[str, Windows]:
    """Return the windows of texts by role."""
    windows = {}
    for role, kinds in texts.items():
        with _naming(role):
            windows[role] = cut_all(kinds, tokenizer)
    return windows


@contextmanager
def _naming(role: str) -> Iterator[None]:
    """Let an error inside the context name the text's role."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from error


def _group_of(config: Config) -> str:
    """Return the comparison group of all candidates; n:m patterns fix their own."""
    if all(task.pattern != "unstructured" for task in config.all_tasks):
        return "row"
    return config.pruning.group


def _check_texts(config: Config) -> list[str]:
    """Check texts without a network; return a line for each that needs the hub.

    Raises:
        ValueError: If a text is unknown, missing or malformed, or two of them overlap.
    """
    tasks = [_texts(task.texts) for task in config.all_tasks]
    notes = []
    for task in tasks:
        for role, texts in task.items():
            with _naming(role):
                notes += [f"{role}: {note}" for text in texts if (note := text.check())]
    for one, other in product(tasks, tasks):
        # Check each role of a task against the other roles of every task.
        for role in ROLES:
            overlaps = check_disjoint({**other, role: one[role]})
            if overlaps and not config.allow_test_selection:
                raise ValueError(
                    f"{overlaps[0]}: give disjoint texts, or set allow_test_selection: true"
                )
    return notes


def _check_models(config: Config) -> None:
    """Check models, but for the weights of those from the hub, against their tasks."""
    for task in config.all_tasks:
        windows = task.fitness.windows
        stages = config.search.stages
        # With several tasks, a stop after all windows of one still saves evaluating the others.
        several = len(config.all_tasks) > 1
        if stages and windows and stages[-1] >= windows + several:
            rule = "at most" if several else "below"
            raise ValueError(
                f"search.stages must be {rule} fitness.windows = {windows}, got {stages}"
            )
        _check_model(task)


def _check_model(task: TaskConfig) -> None:
    config = load_config(task.model)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    for role, text in task.texts.items():
        if limit and text.length > limit:
            raise ValueError(
                f"{role}.length must be at most the model's {limit} positions, got {text.length}"
            )
    if pattern := parse_pattern(task.pattern):
        check_layers(skeleton(config, DTYPES[task.dtype]), Target(task.sparsity, pattern))
