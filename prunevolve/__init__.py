"""Evolve symbolic pruning metrics for language models, and prune with them; see docs/PYTHON.md.

A public name is loaded when it is asked for: torch and transformers take seconds, and what only a
search needs may not be installed.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunevolve.pruning.api import *
    from prunevolve.search.run import *

_PUBLIC = {
    "prunevolve.pruning.api": (
        *("Criterion", "Metric", "PruneReport", "Statistics", "collect_statistics", "load_model"),
        *("load_tokenizer", "prune", "read_metric"),
    ),
    "prunevolve.search.run": (
        *("Found", "Record", "Result", "Unfinished", "evolve", "read_config", "resume"),
    ),
}

__all__ = [name for names in _PUBLIC.values() for name in names]


def __getattr__(name: str) -> object:
    for module, names in _PUBLIC.items():
        if name in names:
            return getattr(import_module(module), name)
    if name == "__version__":
        return metadata.version("prunevolve")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
