"""Find config files, and merge each one over its `base`.

`base: NAME_OR_FILE` makes a config start from another one, whose keys it overrides; an entry of
`tasks` may have a base too. Mappings are merged key by key. Any other value, lists included,
replaces the base's.
"""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
"""The folder of the shipped experiments."""

Keys = dict[str, Any]
"""What a YAML file holds: keys and values of any kind."""

BASE = "base"
"""The key that names the config from which missing keys are taken."""

MOST_BASES = 5
"""Longest chain of bases: a longer one is a circle."""

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

    Raises:
        ValueError: If it is a single word, but neither a file nor a shipped experiment.
    """
    path = beside / config
    if path.suffix or len(config.parts) != 1 or _is_file(path):
        return path  # reading it will report anything wrong with it
    if config.name in shipped():
        return FOLDER / f"{config.name}.yaml"
    near = difflib.get_close_matches(config.name, shipped(), n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"config {config.name!r:.60} is neither a file nor a shipped experiment: {guess}"
        f"give a file or one of {', '.join(shipped())}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # no file system accepts the name


def read(path: Path, inherited: Collection[str], above: tuple[Path, ...] = ()) -> Keys:
    """Return a config's keys, and those that it lacks from its base.

    Args:
        inherited: The keys that an entry of `tasks` takes from its base.
        above: The configs that have this one as their base.

    Raises:
        ValueError: If a file is missing or malformed, or it has too long a chain of bases.
    """
    chain = (*above, path)
    if len(above) > MOST_BASES:
        names = " > ".join(file.name for file in chain)
        raise ValueError(f"config {above[0]} has a chain of over {MOST_BASES} bases: {names}")

    def over_base(mapping: Keys, key: str, kept: Collection[str]) -> Keys:
        """Return a mapping merged over the config that it names as its base, if it names one."""
        name = mapping.get(BASE)
        # A copy: the original may be shared through a YAML alias.
        own = {name: value for name, value in mapping.items() if name != BASE}
        if name is None:
            return own
        if not isinstance(name, str) or not name:
            raise ValueError(f"config {path}: {key} must name a config, got {str(name)!r:.60}")
        base = read(find(Path(name), path.parent), inherited, chain)
        return _merged({key: base[key] for key in kept or base if key in base}, own)

    merged = over_base(_content(path), BASE, ())
    if isinstance(tasks := merged.get("tasks"), list):
        merged["tasks"] = [
            over_base(task, f"tasks.{number}.{BASE}", inherited) if isinstance(task, dict) else task
            for number, task in enumerate(tasks)
        ]
    return merged


def _content(path: Path) -> Keys:
    try:
        raw = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    except NO_YAML as error:
        raise ValueError(
            f"config {path} is not YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"config {path} must be a mapping of keys, got {type(raw).__name__}")
    return raw


def without_replaced(base: Keys, overrides: Keys) -> Keys:
    """Return the base without keys that the overrides make meaningless.

    An n:m pattern sets the sparsity, so the base's sparsity goes with the pattern that it replaces.
    Of a text's `mix` and its `corpus` with `split`, one replaces the other.
    """
    replaced: set[str] = set()
    if overrides.get("pattern", "unstructured") != "unstructured":
        replaced.add("sparsity")
    if overrides.get("mix"):
        replaced |= {"corpus", "split"}
    if overrides.get("corpus") is not None:
        replaced.add("mix")
    return {key: value for key, value in base.items() if key not in replaced}


def _merged(base: Keys, overrides: Keys) -> Keys:
    base = without_replaced(base, overrides)
    sections = {
        key: _merged(base[key], value)
        for key, value in overrides.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **overrides, **sections}
