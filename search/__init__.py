"""The search: breeding, evaluating and recording candidate metrics.

The names below are its Python API (docs/PYTHON.md).
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from search.launch import Unfinished as Unfinished
    from search.library import Result as Result
    from search.library import resume as resume
    from search.library import run as run
    from search.population import Record as Record

# Imported on first use, so that no script or worker waits for what it does not need.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "launch": ["Unfinished"],
        "library": ["Result", "resume", "run"],
        "population": ["Record"],
    },
)
