"""Where configs are, and how a file becomes a mapping of keys: its own over those of its `base`.

`base: NAME_OR_FILE` says that a config is another one but for the keys that follow; an entry of
`tasks` may have a base too. Mappings are merged key by key. Any other value, lists among them,
takes the place of the base's.
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
"""The key that names the config whose keys hold where a file says nothing."""

MOST_BYTES = 300_000
"""Longest config that is read: one with thousands of seeds is shorter."""

MOST_BASES = 5
"""Longest chain of bases."""


def shipped() -> list[str]:
    """Return the names of the shipped experiments."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(config: Path, beside: Path = Path()) -> Path:
    """Return the file that a config's name or path means.

    A file that is there comes first, then a shipped experiment of that name.

    Args:
        config: The name or path.
        beside: The folder that a relative path starts from.

    Raises:
        ValueError: If it is a single word and neither.
    """
    path = beside / config
    if path.suffix or len(config.parts) != 1 or _is_file(path):
        return path  # whatever is wrong with it is said when it is read
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
        return False  # a name that no file system takes


def read(path: Path, inherited: Collection[str]) -> dict[str, Any]:
    """Return a config's keys, with those of its base where it says nothing.

    Args:
        inherited: The keys that an entry of `tasks` takes from its base.

    Raises:
        ValueError: If a file is missing, no regular one, too long or malformed, is its own base or
            has too long a chain of them, or all together hold too many values.
    """
    raw = _Reading(inherited).read(path, ())
    if _values(raw, {}) > MOST_VALUES:
        raise ValueError(f"config {path} has more than {MOST_VALUES} values with its bases")
    return raw


@dataclass
class _Reading:
    """One config being read, with the bases that were read for it so far."""

    inherited: Collection[str]
    known: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def read(self, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
        """Return a file's keys with its base's; `above` are the files whose bases led here."""
        chain = (*above, path)
        if len(above) > MOST_BASES:
            names = " > ".join(step.name for step in chain)
            raise ValueError(f"config {above[0]} has a chain of over {MOST_BASES} bases: {names}")
        own = _content(path)
        whole = _merged(self._base_of(own, BASE, chain), _without_base(own))
        if isinstance(tasks := whole.get("tasks"), list):
            whole["tasks"] = [self._task(task, i, chain) for i, task in enumerate(tasks)]
        return whole

    def _task(self, task: object, place: int, chain: tuple[Path, ...]) -> object:
        if not isinstance(task, dict):
            return task
        base = self._base_of(task, f"tasks.{place}.{BASE}", chain)
        return _merged(
            {key: base[key] for key in self.inherited if key in base}, _without_base(task)
        )

    def _base_of(self, own: dict[str, Any], key: str, chain: tuple[Path, ...]) -> dict[str, Any]:
        """Return the keys of the config that a mapping names as its base; none without one."""
        name = own.get(BASE)
        if name is None:
            return {}
        if not isinstance(name, str) or not name:
            raise ValueError(f"config {chain[-1]}: {key} must name a config, got {str(name)!r:.60}")
        path = find(Path(name), chain[-1].parent)
        if path not in self.known:
            self.known[path] = self.read(path, chain)
        return self.known[path]


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


def _without_base(own: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping's other keys; it stays as it is, since an alias may stand for it too."""
    return {key: value for key, value in own.items() if key != BASE}


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with another's keys over it; neither is changed."""
    both = {
        key: _merged(base[key], value)
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **own, **both}


def _values(value: object, known: dict[int, int]) -> int:
    """Count the values in a value; what stands in several places is looked at once."""
    if id(value) not in known:
        inside = list(value.values()) if isinstance(value, dict) else value
        parts: list[object] = inside if isinstance(inside, list) else []
        known[id(value)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(value)]
