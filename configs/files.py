"""Find config files, merge each one over the one that its `base` names, and apply overrides.

Mappings are merged key by key. Any other value, lists included, replaces the base's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent  # of the shipped experiments
Keys = dict[str, Any]  # what a YAML file holds
BASE = "base"  # the key that names the config from which missing keys are taken


def shipped() -> list[str]:
    """Return the names of the shipped experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: Path, beside: Path = Path()) -> Path:
    """Return the file that a path, relative to a folder, or a shipped experiment's name means."""
    path = beside / config  # which goes first; if there is neither, reading it reports that
    if str(config) in shipped() and not path.is_file():
        return FOLDER / f"{config}.yaml"
    return path


def read(path: Path) -> Keys:
    """Return a config's keys, and those that it lacks from its base, or raise ValueError."""
    own = _content(path)
    if BASE not in own:
        return own
    base = _content(find(Path(str(own.pop(BASE))), path.parent))
    if BASE in base:
        rule = f"its base must have no base itself, got {base[BASE]!r:.60}"
        raise ValueError(f"config {path}: {rule}: write the keys of one of them out")
    return _merged(base, own)


def _content(path: Path) -> Keys:
    try:
        keys = _parsed(path.read_text("utf-8"), f"config {path}")
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; shipped are {', '.join(shipped())}"
        raise ValueError(f"config {path} {problem}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"config {path} must be a mapping of keys, got {type(keys).__name__}")
    return keys


def _parsed(text: str, source: str) -> object:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a date or text
        why = " ".join(str(error).split())
        raise ValueError(f"{source} is not YAML: {why[:200]}") from error


def _merged(base: Keys, over: Keys) -> Keys:
    both = {key for key in base if isinstance(base[key], dict) and isinstance(over.get(key), dict)}
    return base | over | {key: _merged(base[key], over[key]) for key in both}


def apply_overrides(raw: Keys, overrides: Sequence[str]) -> Keys:
    """Return a copy of a mapping with `key.path=value` texts applied, or raise ValueError."""
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set takes key.path=value, got {override!r}")
        raw = _with(raw, path.split("."), _parsed(value, f"--set {path}: {value[:60]!r}"))
    return raw


def _with(section: Any, path: Sequence[str], value: object) -> Any:
    """Return a copy of nested mappings and lists with another value at a path."""
    if not path:
        return value
    key, *rest = path
    if isinstance(section, dict):
        return {**section, key: _with(section.get(key, {}), rest, value)}
    if not isinstance(section, list):
        raise ValueError(f"--set: {key} must be below a mapping or a list, got {section!r:.60}")
    if not key.isdecimal() or int(key) >= len(section):
        raise ValueError(f"--set: {key} must be an index from 0 to {len(section) - 1}")
    return [_with(x, rest, value) if i == int(key) else x for i, x in enumerate(section)]
