"""What a run works with once it is loaded, and what is said of its results' origin."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from configs.schema import Config
from pruning.masks import Target, parse_pattern
from search.journal import RunFolder


@dataclass(frozen=True)
class Run:
    """A run folder with its config, texts and pool.

    Attributes:
        texts: Provenance of the token windows by role.
        pool: A `RayPool` or an `InProcessPool`.
    """

    folder: RunFolder
    config: Config
    texts: dict[str, dict[str, Any]]
    pool: Any
    console: Console

    def target(self) -> Target:
        """Return what every candidate is asked to remove."""
        pruning = self.config.pruning
        return Target(pruning.sparsity, pruning.group, parse_pattern(pruning.pattern))

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return what makes a result repeatable; the same for any number of workers."""
        config = self.config
        return {
            "model": config.model,
            "dtype": config.dtype,
            "pruning": config.pruning.model_dump(),
            "texts": self.texts,
            "seed": config.search.seed,
            "candidates": config.search.candidates,
            **more,
        }
