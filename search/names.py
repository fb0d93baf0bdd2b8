"""Names in a config, checked before any slow import."""

import re
from pathlib import Path
from typing import get_args

from configs.schema import Config, GroupName
from evaluation.sources import HUB_CORPORA, check_name
from hub_answers import silence
from pruning.names import EMBEDDED, comes_from_hub, metric_file, split_revision


def check_names(config: Config) -> None:
    """Check the names of models, texts and seeds, without a network and without reading a file.

    Raises:
        ValueError: If a model is neither a folder nor a hub id, a corpus neither known nor a
            file's name, or a seed a word that names no metric.
    """
    for entry in config.search.seeds:
        _check_seed(entry)
    for task in config.all_tasks:
        is_here(task.model)
        for role, text in task.texts.items():
            for part in text.parts:
                try:
                    check_name(part.corpus)
                except ValueError as error:
                    raise ValueError(f"{role}: {error}") from error


def _check_seed(entry: str) -> None:
    """Check a metric's name; formulas, files and run folders are read after torch is imported."""
    group, colon, rest = entry.partition(":")
    name = rest if colon and group in get_args(GroupName) else entry
    if re.fullmatch(r"[\w-]{2,100}", name, re.ASCII) and not Path(name).exists():
        metric_file(name)


def check_hub(config: Config) -> None:
    """Check that the hub answers if a model or a text has to come from there.

    Raises:
        ValueError: If it does not, or offline mode is set; one line, within a few seconds.
    """
    # Imported here, because few searches need it.
    from huggingface_hub import constants, try_to_load_from_cache

    def is_cached(model: str) -> bool:
        name, revision = split_revision(model)
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)

    places = [(task.model, text) for task in config.all_tasks for text in task.texts.values()]
    remote = [
        f"model {model!r}"
        for model in dict.fromkeys(model for model, _ in places)
        if not is_here(model) and not is_cached(model)
    ]
    corpora = {part.corpus: None for _, text in places for part in text.parts}
    if not constants.HF_HUB_OFFLINE:  # with it, texts are read from the cache
        remote += [f"corpus {corpus!r}" for corpus in corpora if corpus in HUB_CORPORA]
    if not remote:
        return
    offline = "HF_HUB_OFFLINE is set, and the hub's cache does not have it"
    if cause := offline if constants.HF_HUB_OFFLINE else silence():
        raise ValueError(
            f"{remote[0]} comes from the Hugging Face hub, which cannot be reached ({cause}): give "
            "a folder or a local file, or fill the hub's cache elsewhere"
        )


def is_here(model: str) -> bool:
    """Return whether a model is a folder on this machine; if not, its name must be a hub id.

    Raises:
        ValueError: If it is neither.
    """
    if model.startswith("models/") and not Path(model).is_dir():
        raise ValueError(
            f"model {model!r} is no folder: give {EMBEDDED}, a folder or a hub id"
            + (" (`make smollm2` builds it)" if "smollm2" in model else "")
        )
    return not comes_from_hub(model)
