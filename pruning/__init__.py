"""The pruning engine: metric language, statistics, masks and the walk over decoder blocks.

The names below are those of `prunevolve`, which loads everything, so only when one is asked for.
"""

from typing import Any

_PUBLIC = (
    "Criterion",
    "Metric",
    "PruneReport",
    "Statistics",
    "collect_statistics",
    "load_model",
    "load_tokenizer",
    "prune",
    "read_metric",
)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import prunevolve

    return getattr(prunevolve, name)
