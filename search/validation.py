"""What is wrong with a config, found before any work."""

import re
from pathlib import Path

from configs.schema import Config, Task
from pruning import models
from pruning.masks import GROUPS, Target, parse_pattern
from pruning.pruner import check_layers
from pruning.result.request import resolve_subject, shapes_of
from search.plan import check_texts
from search.seeds import read_seeds

_HUB_ID = re.compile(r"(?!models/)\w[\w.-]*/[\w.-]+")
"""Owner and name; `models/` is where `make smollm2` puts its folder."""


def validate(config: Config) -> list[str]:
    """Check all of a config that can be checked without work.

    Returns:
        One line for each thing that could not be checked here.

    Raises:
        ValueError: If something is wrong; one line that names it.
    """
    for pattern in {config.pruning.pattern, *(task.pattern for task in config.all_tasks)}:
        parse_pattern(str(pattern))
    read_seeds(config.search.seeds, GROUPS)
    notes = dict.fromkeys(check_texts(config))
    for task in config.all_tasks:
        windows = task.texts["fitness"].windows
        if config.search.stages and windows and config.search.stages[-1] >= windows:
            raise ValueError(
                f"search.stages must be below fitness.windows = {windows}, got "
                f"{config.search.stages}"
            )
        assert task.model
        if task.model == models.EMBEDDED or Path(task.model).is_dir():
            _check_model(task.model, task)
        elif _HUB_ID.fullmatch(task.model):
            note = f"model {task.model}: it comes from the Hugging Face hub: not checked"
            notes[note] = None
        else:
            raise ValueError(
                f"model {task.model!r} is no folder: give embedded, a folder or a hub id"
                + (" (`make smollm2` builds it)" if "smollm2" in task.model else "")
            )
    return list(notes)


def _check_model(model: str, task: Task) -> None:
    config = models.load_config(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for role, text in task.texts.items():
        if limit and text.length > limit:
            raise ValueError(
                f"{role}.length must be at most the model's {limit} positions, got {text.length}"
            )
    if pattern := parse_pattern(str(task.pattern)):
        subject = resolve_subject(model, str(task.dtype), "cpu", None)
        check_layers(shapes_of(subject), Target(task.sparsity or 0.0, pattern))
