"""Names in a config, checked before anything is imported that takes long."""

import difflib
import re
from pathlib import Path

from configs.schema import Config
from evaluation.sources import EMBEDDED, check_name

_HUB_ID = re.compile(r"(?!models/)\w[\w.-]*/[\w.-]+")
"""Owner and name; `models/` is where `make smollm2` puts its folder."""


def check_names(config: Config) -> None:
    """Check the names of models and texts, without a network and without reading a file.

    Raises:
        ValueError: If a model is neither a folder nor a hub id, or a corpus neither known nor a
            file's name.
    """
    for task in config.all_tasks:
        is_here(task.model)
        for role, text in task.texts.items():
            for part in text.parts:
                try:
                    check_name(part.corpus)
                except ValueError as error:
                    raise ValueError(f"{role}: {error}") from error


def is_here(model: str) -> bool:
    """Tell whether a model is on this machine, or else has a name as the hub gives them.

    Raises:
        ValueError: If it is neither.
    """
    if model == EMBEDDED or Path(model).is_dir():
        return True
    if _HUB_ID.fullmatch(model):
        return False
    near = difflib.get_close_matches(model.lower(), [EMBEDDED], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"model {model!r} is no folder: give embedded, a folder or a hub id{hint}"
        + (" (`make smollm2` builds it)" if "smollm2" in model else "")
    )
