"""What a model may be called: `embedded`, a folder, or a hub id with or without a revision."""

import difflib
import re
from pathlib import Path

EMBEDDED = "embedded"
"""Name of the tiny LLaMA that ships in this package."""

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""Owner and name, and perhaps a branch, tag or commit: `owner/name@revision`. The hub's models
without an owner are of no family that is supported."""


def comes_from_hub(model: str) -> bool:
    """Return whether a model must come from the hub: owner/name, or owner/name@revision.

    Raises:
        ValueError: If it is neither `embedded`, nor a folder, nor called so.
    """
    if model == EMBEDDED or _is_folder(model):
        return False
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return True
    near = difflib.get_close_matches(model[:40].lower(), [EMBEDDED])
    guess = f"did you mean {EMBEDDED}? or " if near else ""
    raise ValueError(
        f"model {model[:200]!r} is no folder: {guess}give {EMBEDDED}, a folder or a hub id"
    )


def _is_folder(model: str) -> bool:
    try:
        return bool(model) and Path(model).is_dir()
    except OSError:
        return False  # no file system accepts the name


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the id and the revision of a hub model; any other name as it is, and None."""
    parts = HUB_ID.fullmatch(model)
    return (parts[1], parts[2]) if parts and not Path(model).exists() else (model, None)


def with_revision(model: str, revision: str | None) -> str:
    """Return a hub model's name at a revision; the name as it is for None."""
    return f"{model}@{revision}" if revision else model
