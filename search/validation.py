"""What is wrong with a config, found before any work."""

import re
from pathlib import Path

from configs.schema import Config
from pruning import models
from pruning.masks import Target, parse_pattern
from pruning.metric import Metric
from pruning.metric_file import resolve_metric
from pruning.request import check_layers, resolve_subject
from search.texts import check_texts

_HUB_ID = re.compile(r"(?!models/)\w[\w.-]*/[\w.-]+")
"""Owner and name; `models/` is where `make smollm2` puts its folder."""


def validate(config: Config) -> list[str]:
    """Check all of a config that can be checked without work.

    Returns:
        One line for each thing that could not be checked here.

    Raises:
        ValueError: If something is wrong; one line that names it.
    """
    parse_pattern(config.pruning.pattern)
    for seed in config.search.seeds:
        seed_metric(seed)
    notes = check_texts(config)
    windows = config.fitness.windows
    if config.search.stages and windows and config.search.stages[-1] >= windows:
        raise ValueError(
            f"search.stages must be below fitness.windows = {windows}, got {config.search.stages}"
        )
    if config.model == models.EMBEDDED or Path(config.model).is_dir():
        _check_model(config)
    elif _HUB_ID.fullmatch(config.model):
        notes.append(f"model {config.model}: it comes from the Hugging Face hub: not checked")
    else:
        raise ValueError(
            f"model {config.model!r} is no folder: give embedded, a folder or a hub id"
            + (" (`make smollm2` builds it)" if "smollm2" in config.model else "")
        )
    return notes


def seed_metric(argument: str) -> Metric:
    """Return the metric that an entry of `search.seeds` means; raises ValueError if none."""
    return resolve_metric(argument).metric.check_scores_weights()


def _check_model(config: Config) -> None:
    limit = getattr(
        models.load_config(config.model).get_text_config(), "max_position_embeddings", None
    )
    for role, text in config.texts.items():
        if limit and text.length > limit:
            raise ValueError(
                f"{role}.length must be at most the model's {limit} positions, got {text.length}"
            )
    if pattern := parse_pattern(config.pruning.pattern):
        subject = resolve_subject(config.model, config.dtype, "cpu", None)
        check_layers(subject, Target(config.pruning.sparsity, config.pruning.group, pattern))
