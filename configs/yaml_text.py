"""YAML as a config is written in it: safe, without sexagesimal numbers, and not made to grow."""

import re
from typing import Any

import yaml

try:  # ten times as fast
    from yaml import CSafeLoader as _SafeLoader
except ImportError:
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

MOST_VALUES = 50_000
"""Values in a text, each alias counted as what it stands for."""

NO_YAML = (yaml.YAMLError, RecursionError, ValueError)
"""What `read_yaml` raises of a text that is none; ValueError is of dates and numbers."""


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: If it is malformed, holds more than plain values, or more than
            `MOST_VALUES` of them.
        RecursionError: If it is nested too deeply.
        ValueError: If a date or a number is none.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"more than {MOST_VALUES} values, or one that holds itself")
        return loader.construct_document(root)
    finally:
        loader.dispose()


class _Loader(_SafeLoader):
    """The safe loader without YAML 1.1's numbers to base 60: 2:4 is a pattern, not 124."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if not tag.endswith(":int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Count the values of a node: nine aliases of nine aliases of nine are 729, and so on."""
    if node not in known:
        known[node] = MOST_VALUES  # what an alias stands for that is inside of its own node
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = [part if isinstance(part, tuple) else (part,) for part in parts]  # key and value
        known[node] = 1 + sum(_values(part, known) for pair in inside for part in pair)
    return known[node]
