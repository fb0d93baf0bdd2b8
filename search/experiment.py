"""What a search works with, resolved from its config once: tasks, texts, seeds, settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from configs.schema import ROLES, Config, Text
from configs.schema import Task as TaskConfig
from evaluation.corpus import Provenance, Windows, check_disjoint
from evaluation.mixture import Mixture, Part
from pruning.baselines import BASELINES
from pruning.leaves import LEAF_SETS
from pruning.masks import GROUPS, Target, parse_pattern
from pruning.models import load_config, load_tokenizer
from pruning.pruner import check_layers
from pruning.result.request import resolve_subject, shapes_of
from search.breeding.primitives import primitive_set
from search.breeding.variation import Variation
from search.evolution import Settings
from search.fitness import Setup, Task
from search.names import is_here
from search.population import Rules
from search.resident import Memory, Subject
from search.scale import unit_of
from search.seeds import read_seeds


@dataclass(frozen=True)
class Experiment:
    """What a search works with.

    Attributes:
        config: Where it comes from; its seeds as texts, so that they need no other file.
        subjects: The models.
        texts: The four texts of each model, by role.
        tasks: What is asked of a candidate; the first is what the report leads with.
        leaves: What metrics may name: candidates, seeds and baselines.
        settings: The loop's knobs.
        notes: What could not be checked here, a line for each thing.
        windows: The texts as tokens, once they are read.
    """

    config: Config
    subjects: tuple[Subject, ...]
    texts: tuple[Mapping[str, Text], ...]
    tasks: tuple[Task, ...]
    leaves: frozenset[str]
    settings: Settings
    notes: tuple[str, ...]
    windows: tuple[Mapping[str, Windows], ...] = ()

    def read_texts(self) -> "Experiment":
        """Return the experiment with its windows; raises ValueError if a text cannot be had."""
        windows = []
        for subject, texts in zip(self.subjects, self.texts, strict=True):
            windows.append(_cut(subject.model, {r: _mixture_of(t) for r, t in texts.items()}))
        return replace(self, windows=tuple(windows))

    def read_texts_here(self) -> list[dict[str, int]]:
        """Cut the texts that need no hub; return the tokens of each, by role, for each model.

        Raises:
            ValueError: If one of them cannot be had, or is shorter than its windows.
        """
        found: list[dict[str, int]] = []
        for subject, texts in zip(self.subjects, self.texts, strict=True):
            mixtures = {role: _mixture_of(text) for role, text in texts.items()}
            here = {r: m for r, m in mixtures.items() if is_here(subject.model) and not m.check()}
            cut = _cut(subject.model, here) if here else {}
            found.append({role: windows.tokens.numel() for role, windows in cut.items()})
        return found

    @property
    def memory(self) -> Memory:
        """What a worker holds beside its models, and where."""
        return Memory(**self.config.memory.model_dump())

    @property
    def setup(self) -> Setup:
        """What workers are built from."""
        search, ray = self.config.search, self.config.ray
        return Setup(
            subjects=self.subjects,
            windows=tuple(
                {role: windows.tokens for role, windows in texts.items()} for texts in self.windows
            ),
            tasks=self.tasks,
            leaves=self.leaves,
            objective=search.objective,
            device="cuda" if ray.gpus_per_worker else "cpu",
            threads=ray.cpus_per_worker,
            stages=tuple(search.stages),
            slack=search.slack,
            hopeless=search.hopeless,
            memory=self.memory,
            kinds=tuple(
                {role: _kinds_of(windows) for role, windows in texts.items()}
                for texts in self.windows
            ),
        )

    @property
    def fitness_unit(self) -> str:
        """What a fitness is in; see `search.scale`."""
        kinds = [kind for task in self.config.all_tasks for kind in task.fitness.parts]
        return unit_of(len(kinds))

    def provenance(self, subject: int) -> dict[str, Provenance]:
        """Return where a model's windows come from, by role."""
        return {role: windows.provenance for role, windows in self.windows[subject].items()}

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

    def origin(self, **more: object) -> dict[str, object]:
        """Return what makes a result repeatable; the same for any number of workers."""
        config = self.config
        tasks = {"tasks": self.task_rows()} if len(self.tasks) > 1 else {}
        return {
            "model": config.model,
            "dtype": config.dtype,
            "pruning": config.pruning.model_dump(),
            "texts": self.provenance(0),
            **tasks,
            "objective": config.search.objective,
            "seed": config.search.seed,
            "candidates": config.search.candidates,
            **more,
        }


def resolve(config: Config) -> Experiment:
    """Check all of a config that can be checked without work, and resolve it.

    Raises:
        ValueError: If something is wrong; one line that names it.
    """
    for task in config.all_tasks:
        parse_pattern(task.pattern)
    groups = _groups_of(config)
    seeds = tuple(read_seeds(config.search.seeds, groups))
    notes = [*_check_texts(config), *_check_models(config)]
    held: list[tuple[Subject, dict[str, Text]]] = []
    tasks = []
    for task in config.all_tasks:
        needed = (Subject(task.model, task.dtype), task.texts)
        if needed not in held:
            held.append(needed)
        pattern = parse_pattern(task.pattern)
        tasks.append(Task(task.name, held.index(needed), task.sparsity, pattern, task.weight))
    named = [*seeds, *(baseline.criterion for baseline in BASELINES.values())]
    search = config.search.model_copy(update={"seeds": [str(criterion) for criterion in seeds]})
    return Experiment(
        config=config.model_copy(update={"search": search}),
        subjects=tuple(subject for subject, _ in held),
        texts=tuple(texts for _, texts in held),
        tasks=tuple(tasks),
        leaves=frozenset(LEAF_SETS[search.primitives]).union(*(c.metric.leaves for c in named)),
        settings=Settings(
            seed=search.seed,
            candidates=search.candidates,
            rules=Rules(
                capacity=search.population,
                resolution=search.parsimony,
                kept=int(search.population * search.speciation / len(groups)),
                patience=search.patience,
                lag=search.lag,
                leeway=search.leeway,
                settles=search.settle,
            ),
            groups=groups,
            regroup=search.regroup,
            within=search.speciation,
            seeds=seeds,
            pool=search.pool,
            parents=search.parents,
            simplified=search.simplify,
            crowding=search.crowding,
            brood=search.brood,
            variation=Variation(
                primitives=primitive_set(search.primitives),
                min_initial_depth=search.min_initial_depth,
                max_initial_depth=search.max_initial_depth,
                max_depth=search.max_depth,
                max_size=search.max_size,
                crossover=search.crossover,
                mutation=search.mutation,
                mutations=search.mutations.model_dump(),
            ),
        ),
        notes=tuple(dict.fromkeys(notes)),
    )


def _kinds_of(windows: Windows) -> tuple[str, ...]:
    """Return each window's kind of text: its corpus, and where two are of one the split as well."""
    corpora = [Path(str(part["corpus"])).name for part in windows.parts]
    names = [
        f"{corpus} {part['split']}" if corpora.count(corpus) > 1 else corpus
        for corpus, part in zip(corpora, windows.parts, strict=True)
    ]
    return tuple(names[kind] for kind in windows.kinds)


def _cut(model: str, mixtures: Mapping[str, Mixture]) -> dict[str, Windows]:
    """Return the windows of texts by role; an error names the role."""
    tokenizer = load_tokenizer(model)
    windows = {}
    for role, mixture in mixtures.items():
        try:
            windows[role] = mixture.cut(tokenizer)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from error
    return windows


def _mixture_of(text: Text) -> Mixture:
    parts = tuple(Part(part.corpus, part.split, part.share) for part in text.parts)
    return Mixture(parts, text.windows, text.length, text.seed, text.bos)


def _groups_of(config: Config) -> tuple[str, ...]:
    """Return the comparison groups that candidates may have; n:m patterns know no other."""
    if all(task.pattern != "unstructured" for task in config.all_tasks):
        return ("row",)
    group = config.pruning.group
    return GROUPS if group == "free" else (group,)


def _check_texts(config: Config) -> list[str]:
    """Check texts without a network; return a line for each that needs the hub.

    Raises:
        ValueError: If a text is unknown, missing or malformed, or two of them overlap.
    """
    tasks = [
        {role: _mixture_of(text) for role, text in task.texts.items()} for task in config.all_tasks
    ]
    notes = [f"{role}: {note}" for task in tasks for role, note in _text_notes(task)]
    places = [{role: mixture.places for role, mixture in task.items()} for task in tasks]
    for one, other in product(places, places):
        # Each role of the one beside the other roles of the other.
        for role in ROLES:
            overlaps = check_disjoint({**other, role: one[role]})
            if overlaps and not config.allow_test_selection:
                raise ValueError(
                    f"{overlaps[0]}: give disjoint texts, or set allow_test_selection: true"
                )
    return notes


def _text_notes(task: Mapping[str, Mixture]) -> Iterator[tuple[str, str]]:
    for role, mixture in task.items():
        try:
            yield from ((role, note) for note in mixture.check())
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from error


def _check_models(config: Config) -> list[str]:
    """Check models against their tasks; return a line for each that is not here."""
    notes = []
    for task in config.all_tasks:
        windows = task.fitness.windows
        stages = config.search.stages
        # After all windows of one of several tasks there still are the other tasks to be spared.
        several = len(config.all_tasks) > 1
        if stages and windows and stages[-1] >= windows + several:
            rule = "at most" if several else "below"
            raise ValueError(
                f"search.stages must be {rule} fitness.windows = {windows}, got {stages}"
            )
        if is_here(task.model):
            _check_model(task)
        else:
            notes.append(f"model {task.model}: it comes from the Hugging Face hub: not checked")
    return notes


def _check_model(task: TaskConfig) -> None:
    limit = getattr(load_config(task.model).get_text_config(), "max_position_embeddings", None)
    for role, text in task.texts.items():
        if limit and text.length > limit:
            raise ValueError(
                f"{role}.length must be at most the model's {limit} positions, got {text.length}"
            )
    if pattern := parse_pattern(task.pattern):
        shapes = shapes_of(resolve_subject(task.model, task.dtype, "cpu", None))
        check_layers(shapes, Target(task.sparsity, pattern))
