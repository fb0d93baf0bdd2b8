"""The pruning engine: metric language, statistics, masks and the walk over decoder blocks.

The names below are its Python API (docs/PYTHON.md).
"""

from typing import TYPE_CHECKING

import lazy_loader

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

# Imported on first use, so that no script or worker waits for what it does not need.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "criterion": ["Criterion"],
        "leaves": ["Statistics"],
        "library": ["PruneReport", "collect_statistics", "prune"],
        "metric": ["Metric"],
        "metric_file": ["read_metric"],
        "models": ["load_model", "load_tokenizer"],
    },
)
