"""The pruning engine: metric language, statistics, masks and the walk over decoder blocks.

The names below are its Python API (docs/PYTHON.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.criterion import Criterion as Criterion
    from pruning.leaves import Statistics as Statistics
    from pruning.library import PruneReport as PruneReport
    from pruning.library import collect_statistics as collect_statistics
    from pruning.library import prune as prune
    from pruning.metric import Metric as Metric
    from pruning.metric_file import read_metric as read_metric
    from pruning.models import load_model as load_model
    from pruning.models import load_tokenizer as load_tokenizer

_HOMES = {
    "Criterion": "pruning.criterion",
    "Metric": "pruning.metric",
    "PruneReport": "pruning.library",
    "Statistics": "pruning.leaves",
    "collect_statistics": "pruning.library",
    "load_model": "pruning.models",
    "load_tokenizer": "pruning.models",
    "prune": "pruning.library",
    "read_metric": "pruning.metric_file",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    # Imported when it is asked for, so that no script or worker waits for what it does not use.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
