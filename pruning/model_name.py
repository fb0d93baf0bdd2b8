"""What a model's name stands for: `embedded`, a folder, or a hub id. Nothing here imports torch."""

import re
from pathlib import Path

EMBEDDED = "embedded"  # the tiny LLaMA that ships in this package

# What builds a folder of models/, which is no hub id.
_MADE = {"models/smollm2-135m": "make smollm2", "models/gemma3-270m": "make gemma3"}

_HUB_ID = re.compile(r"((?!models/)[A-Za-z0-9][\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def hub_id(model: str) -> tuple[str, str | None] | None:
    """Return the id and revision of a model that comes from the hub; None for one that is here.

    Raises ValueError if it can be neither.
    """
    model = str(model)
    if model == EMBEDDED or (model and Path(model).is_dir()):
        return None
    if parts := _HUB_ID.fullmatch(model):
        return parts[1], parts[2]
    made = f"`{_MADE[model]}` builds it, or " if model in _MADE else ""
    raise ValueError(f"model {model!r} is no folder: {made}give {EMBEDDED}, a folder or a hub id")
