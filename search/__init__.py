"""The search: breeding, evaluating and recording candidate metrics.

The names below are those of `prunevolve`, which loads everything, so only when one is asked for.
"""

from typing import Any

_PUBLIC = ("Record", "Result", "Unfinished", "resume", "run")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import prunevolve

    return getattr(prunevolve, name)
