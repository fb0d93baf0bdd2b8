"""From a config to plain tasks: the models that are held, their texts as token windows."""

from dataclasses import dataclass
from itertools import product

from configs.schema import ROLES, Config, Text
from configs.schema import Task as TaskConfig
from evaluation.corpus import Windows, check_available, check_disjoint, token_windows
from pruning.baselines import BASELINES
from pruning.leaves import LEAF_SETS
from pruning.masks import GROUPS, parse_pattern
from pruning.models import load_tokenizer
from search.fitness import Task
from search.resident import Subject
from search.seeds import read_seeds


@dataclass(frozen=True)
class Plan:
    """What a run evaluates on.

    Attributes:
        subjects: The models.
        windows: Token windows by role, for each model.
        tasks: What is asked of them; the first is what the report leads with.
    """

    subjects: tuple[Subject, ...]
    windows: tuple[dict[str, Windows], ...]
    tasks: tuple[Task, ...]


def check_texts(config: Config) -> list[str]:
    """Check a config's texts without a network; return a line for each that needs the hub.

    Raises:
        ValueError: If a text is unknown, missing or malformed, or two of them overlap.
    """
    tasks = [_places(task) for task in config.all_tasks]
    for one, other in product(tasks, tasks):
        # Each role of the one beside the other roles of the other.
        for role in ROLES:
            overlaps = check_disjoint({**other, role: one[role]})
            if overlaps and not config.allow_test_selection:
                raise ValueError(
                    f"{overlaps[0]}: give disjoint texts, or set allow_test_selection: true"
                )
    notes = {
        f"{role}: {note}": None
        for task in tasks
        for role, place in task.items()
        if (note := check_available(*place))
    }
    return list(notes)


def leaves_of(config: Config) -> frozenset[str]:
    """Return the leaves that a run's metrics may name: candidates, seeds and baselines."""
    search = config.search
    named = [baseline.metric for baseline in BASELINES.values()]
    named += [metric for metric, _ in read_seeds(search.seeds, GROUPS)]
    return frozenset(LEAF_SETS[search.primitives]).union(*(metric.leaves for metric in named))


def load_plan(config: Config) -> Plan:
    """Return the models, tasks and token windows; raises ValueError where a text cannot be had."""
    held: list[tuple[Subject, dict[str, Text]]] = []
    tasks = []
    for task in config.all_tasks:
        assert task.model and task.dtype and task.pattern and task.sparsity is not None
        needed = (Subject(task.model, task.dtype), task.texts)
        if needed not in held:
            held.append(needed)
        pattern = parse_pattern(task.pattern)
        tasks.append(Task(task.name, held.index(needed), task.sparsity, pattern, task.weight))
    windows = [_windows(subject.model, texts) for subject, texts in held]
    return Plan(tuple(subject for subject, _ in held), tuple(windows), tuple(tasks))


def _windows(model: str, texts: dict[str, Text]) -> dict[str, Windows]:
    tokenizer = load_tokenizer(model)
    return {
        role: token_windows(
            tokenizer, text.corpus, text.split, text.windows, text.length, text.seed
        )
        for role, text in texts.items()
    }


def _places(task: TaskConfig) -> dict[str, tuple[str, str]]:
    return {role: (text.corpus, text.split) for role, text in task.texts.items()}
