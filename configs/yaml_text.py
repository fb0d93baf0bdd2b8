"""A safe YAML reader for configs: no sexagesimal numbers, and no aliases that blow up in size."""

import re
from typing import Any

import yaml

try:  # ten times as fast
    from yaml import CSafeLoader as _SafeLoader
except ImportError:
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

MOST_VALUES = 50_000
"""Most values in a text, with aliases expanded."""

NO_YAML = (yaml.YAMLError, RecursionError, ValueError)
"""What `read_yaml` raises for a bad text; ValueError is for dates and numbers."""


def read_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: If it is malformed, holds anything but plain values, or more than
            `MOST_VALUES` of them.
        RecursionError: If it is nested too deeply.
        ValueError: If a date or a number is invalid.
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
    """The safe loader without YAML 1.1's base-60 numbers: 2:4 is a pattern, not 124."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if not tag.endswith(":int")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)


def _values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Count the values of a node with aliases expanded: 9 aliases of 9 aliases of 9 are 729."""
    if node not in counts:
        counts[node] = MOST_VALUES  # the count of an alias inside its own node
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        entries = [part if isinstance(part, tuple) else (part,) for part in parts]  # key and value
        counts[node] = 1 + sum(_values(part, counts) for entry in entries for part in entry)
    return counts[node]
