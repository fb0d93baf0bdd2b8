"""What a model and a metric may be called: told before anything that takes long is imported."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from hub_answers import silence
from pruning.baselines import NAMED

EMBEDDED = "embedded"
"""Name of the tiny LLaMA that ships in this package."""

FORMS = (
    f"give one of {', '.join(NAMED)}, a file, a run folder, or a formula such as mul(W, sqrt(X))"
)

METRIC_FILES = ("best_metric.json", "pruning_recipe.json")
"""What holds a metric in the folder of a search, and of a pruned model."""

_PATH = re.compile(r"[/\\~]|\.(json|txt)$")

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
"""Owner and name, and perhaps a branch, tag or commit: `owner/name@revision`. The hub's models
without an owner are of no family that is supported."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean wanda? or ` for the nearest name, in any case; empty if none is near."""
    near = difflib.get_close_matches(name[:40].lower(), list(names), n=1)
    return f"did you mean {near[0]}? or " if near else ""


def metric_file(argument: str) -> Path | None:
    """Return the file that a metric is to be read from; None for a name and for a formula.

    A folder stands for what a search or a pruning wrote into it. No file is read.

    Raises:
        ValueError: If the argument is a path to nothing, a folder of something else, or a word that
            is no metric's name.
    """
    if argument in NAMED:
        return None
    if place := _there(argument):
        if not place.is_dir():
            return place
        if found := next((place / name for name in METRIC_FILES if (place / name).is_file()), None):
            return found
        raise ValueError(
            f"metric {argument!r} is a folder without {METRIC_FILES[0]}, which a search writes at "
            f"its end: {FORMS}"
        )
    if _PATH.search(argument) and not _is_like_a_formula(argument):
        raise ValueError(
            f"metric {argument[:200]!r} looks like a file and there is no such file: {FORMS}"
        )
    # A single letter is a leaf, or the language says which ones there are.
    if re.fullmatch(r"[\w-]{2,}", argument):
        guess = nearest(argument, NAMED)
        raise ValueError(f"metric {argument[:200]!r} is no known name: {guess}{FORMS}")
    return None


def _is_like_a_formula(argument: str) -> bool:
    """Tell whether all words are capital letters or stand before a bracket: no path's do."""
    rest = re.sub(r"\b[A-Z]\b|\b\w+\s*\(|\b\d[\d.]*(e[-+]?\d+)?\b", " ", argument)
    return not re.search(r"[\w~\\\0]", rest)


def _there(argument: str) -> Path | None:
    """Return the path of what is there, a pipe or a folder as well; None if nothing is."""
    try:
        path = Path(argument).expanduser()
        return path if argument and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None  # a formula is longer than a file's name may be; ~nobody has no home


def comes_from_hub(model: str) -> bool:
    """Return whether a model must come from the hub: owner/name, or owner/name@revision.

    Raises:
        ValueError: If it is neither `embedded`, nor a folder, nor called so.
    """
    try:
        if model == EMBEDDED or (model and Path(model).is_dir()):
            return False
    except OSError:
        return False  # what is wrong with the folder is said where it is looked into
    if HUB_ID.fullmatch(model) and not Path(model).exists():
        return True
    guess = nearest(model, [EMBEDDED])
    raise ValueError(
        f"model {model[:200]!r} is no folder: {guess}give {EMBEDDED}, a folder or a hub id"
    )


def split_revision(model: str) -> tuple[str, str | None]:
    """Return the id and the revision of a hub model; any other name as it is, and None."""
    parts = HUB_ID.fullmatch(model)
    return (parts[1], parts[2]) if parts and not Path(model).exists() else (model, None)


def with_revision(model: str, revision: str | None) -> str:
    """Return a hub model's name at a revision; the name as it is for None."""
    return f"{model}@{revision}" if revision else model


def check_hub_model(model: str) -> None:
    """Check that the hub answers; raises ValueError where it does not."""
    if cause := silence():
        raise ValueError(
            f"model {model!r} cannot be loaded: there is no such folder, and the Hugging Face hub "
            f"does not answer ({cause}); give {EMBEDDED} or a folder"
        )
