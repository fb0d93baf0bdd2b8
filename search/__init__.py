"""The search: breeding, evaluating and recording candidate metrics.

The names below are its Python API (docs/PYTHON.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.launch import Unfinished as Unfinished
    from search.library import Result as Result
    from search.library import resume as resume
    from search.library import run as run
    from search.population import Record as Record

_HOMES = {
    "Record": "search.population",
    "Result": "search.library",
    "Unfinished": "search.launch",
    "resume": "search.library",
    "run": "search.library",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    # Imported on first use, so that no script or worker waits for what it does not need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
