"""Find config files, merge each one over its `base`, and apply overrides.

`base: NAME_OR_FILE` at the top of a config makes it start from another one, whose keys it
overrides. Mappings are merged key by key. Any other value, lists included, replaces the base's.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
"""The folder of the shipped experiments."""

Keys = dict[str, Any]
"""What a YAML file holds: keys and values of any kind."""

BASE = "base"
"""The key that names the config from which missing keys are taken."""

NO_YAML = (yaml.YAMLError, RecursionError, ValueError)
"""What `read_yaml` raises for a bad text; ValueError is for dates and numbers."""


class _Loader(yaml.SafeLoader):
    """The safe loader without YAML 1.1's base-60 numbers: 2:4 is a pattern, not 124."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if not tag.endswith(":int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text; raises one of `NO_YAML` if it is malformed."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def shipped() -> list[str]:
    """Return the names of the shipped experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: Path, beside: Path = Path()) -> Path:
    """Return the file that a config's name or path means.

    An existing file takes precedence over a shipped experiment of the same name.

    Args:
        config: The name or path.
        beside: The folder to which a relative path is relative.
    """
    path = beside / config
    if str(config) in shipped() and not path.is_file():
        return FOLDER / f"{config}.yaml"
    return path  # reading it will report anything wrong with it


def read(path: Path) -> Keys:
    """Return a config's keys, and those that it lacks from its base.

    Raises:
        ValueError: If a file is missing or malformed, or the base has a base.
    """
    own = _content(path)
    if BASE not in own:
        return own
    name = own.pop(BASE)
    if not isinstance(name, str) or not name:
        raise ValueError(f"config {path}: base must name a config, got {str(name)!r:.60}")
    base = _content(find(Path(name), path.parent))
    if BASE in base:
        raise ValueError(
            f"config {path}: its base {name} must have no base itself, got {base[BASE]!r:.60}: "
            "write the keys of one of them out"
        )
    return _merged(base, own)


def _content(path: Path) -> Keys:
    try:
        raw = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        near = difflib.get_close_matches(path.name, shipped(), n=1)
        guess = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
        raise ValueError(f"config {path} cannot be read: {error.strerror}; {guess}") from error
    except NO_YAML as error:
        raise ValueError(
            f"config {path} is not YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"config {path} must be a mapping of keys, got {type(raw).__name__}")
    return raw


def _merged(base: Keys, over: Keys) -> Keys:
    sections = {
        key: _merged(base[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **over, **sections}


def apply_overrides(raw: Keys, overrides: Sequence[str]) -> Keys:
    """Return a copy of a mapping with `key.path=value` texts applied.

    Raises:
        ValueError: If a text has no `=`, its value is not YAML, or its path leads through a value.
    """
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise ValueError(f"--set takes key.path=value, got {override!r}")
        try:
            parsed = read_yaml(value)
        except NO_YAML as error:
            raise ValueError(f"--set {path}: {value[:60]!r} is not a YAML value") from error
        try:
            raw = _with(raw, path.split("."), parsed)
        except ValueError as error:
            raise ValueError(f"--set {override}: {error}") from error
    return raw


def _with(section: Any, path: Sequence[str], value: object) -> Any:
    """Return a copy of nested mappings and lists with another value at a path."""
    if not path:
        return value
    key, *rest = path
    if isinstance(section, dict):
        return {**section, key: _with(section.get(key, {}), rest, value)}
    if not isinstance(section, list):
        raise ValueError(f"{key} must be below a mapping or a list, got {str(section)!r:.60}")
    if not key.isdecimal() or int(key) >= len(section):
        raise ValueError(f"{key} must be an index from 0 to {len(section) - 1}")
    place = int(key)
    return [*section[:place], _with(section[place], rest, value), *section[place + 1 :]]
