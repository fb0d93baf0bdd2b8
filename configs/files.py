"""Find config files, and merge each one over its `base`.

`base: NAME_OR_FILE` makes a config start from another one, whose keys it overrides; an entry of
`tasks` may have a base too. Mappings are merged key by key. Any other value, lists included,
replaces the base's.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.yaml_text import MOST_VALUES, NO_YAML, read_yaml
from plain_files import read_bytes

FOLDER = Path(__file__).parent
"""The folder of the shipped experiments."""

BASE = "base"
"""The key that names the config from which missing keys are taken."""

MOST_BYTES = 300_000
"""Longest config that is read; one with thousands of seeds is still shorter."""

MOST_BASES = 5
"""Longest chain of bases."""


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


def read(path: Path, inherited: Collection[str]) -> dict[str, Any]:
    """Return a config's keys, and those that it lacks from its base.

    Args:
        inherited: The keys that an entry of `tasks` takes from its base.

    Raises:
        ValueError: If a file is missing, not a regular file, too long or malformed; if it is its
            own base or has too long a chain of bases; or if all files together hold too many
            values.
    """
    raw = _Reading(inherited).read(path, ())
    if _values(raw, {}) > MOST_VALUES:
        raise ValueError(f"config {path} has more than {MOST_VALUES} values with its bases")
    return raw


@dataclass
class _Reading:
    """One config being read, with the bases read for it so far."""

    inherited: Collection[str]
    bases: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """Return a file's keys merged over its base's; `above` are the files that led to it."""
        chain = (*above, path)
        if len(above) > MOST_BASES:
            names = " > ".join(file.name for file in chain)
            raise ValueError(f"config {above[0]} has a chain of over {MOST_BASES} bases: {names}")
        content = _content(path)
        merged = _merged(self._base_of(content, BASE, chain), _without_base(content))
        if isinstance(tasks := merged.get("tasks"), list):
            merged["tasks"] = [self._task(task, i, chain) for i, task in enumerate(tasks)]
        return merged

    def _task(self, task: object, index: int, chain: tuple[Path, ...]) -> object:
        if not isinstance(task, dict):
            return task
        base = self._base_of(task, f"tasks.{index}.{BASE}", chain)
        return _merged(
            {key: base[key] for key in self.inherited if key in base}, _without_base(task)
        )

    def _base_of(
        self, mapping: dict[str, Any], key: str, chain: tuple[Path, ...]
    ) -> dict[str, Any]:
        """Return the keys of the config that a mapping names as its base; empty if it has none."""
        name = mapping.get(BASE)
        if name is None:
            return {}
        if not isinstance(name, str) or not name:
            raise ValueError(f"config {chain[-1]}: {key} must name a config, got {str(name)!r:.60}")
        path = find(Path(name), chain[-1].parent)
        if path not in self.bases:
            self.bases[path] = self.read(path, chain)
        return self.bases[path]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    try:
        raw = read_yaml(content.decode("utf-8"))
    except NO_YAML as error:
        raise ValueError(
            f"config {path} is not YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"config {path} must be a mapping of keys, got {type(raw).__name__}")
    return raw


def _without_base(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without the base; the original may be shared through a YAML alias."""
    return {key: value for key, value in mapping.items() if key != BASE}


def without_replaced(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
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


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    base = without_replaced(base, overrides)
    sections = {
        key: _merged(base[key], value)
        for key, value in overrides.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **overrides, **sections}


def _values(value: object, counts: dict[int, int]) -> int:
    """Count the values in a value; a part that occurs several times is visited once."""
    if id(value) not in counts:
        content = list(value.values()) if isinstance(value, dict) else value
        parts: list[object] = content if isinstance(content, list) else []
        counts[id(value)] = 1 + sum(_values(part, counts) for part in parts)
    return counts[id(value)]
