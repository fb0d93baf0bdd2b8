"""What a run works with once it is loaded, and what is said of its results' origin."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
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


def environment(fingerprints: dict[str, Any]) -> dict[str, Any]:
    """Return what `environment.json` holds: versions, devices and the given fingerprints."""
    packages = ("torch", "transformers", "deap", "ray", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: metadata.version(name) for name in packages},
        "fingerprints": fingerprints,
    }
