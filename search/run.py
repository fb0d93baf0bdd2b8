"""What a run works with once it is loaded, and what is said of its results' origin."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from rich.console import Console

from configs.schema import Config
from search.journal import RunFolder
from search.plan import Plan


@dataclass(frozen=True)
class Run:
    """A run folder with its config, plan and pool.

    Attributes:
        plan: Models, texts and tasks.
        pool: A `RayPool` or an `InProcessPool`.
    """

    folder: RunFolder
    config: Config
    plan: Plan
    pool: Any
    console: Console

    def texts(self, subject: int) -> dict[str, dict[str, Any]]:
        """Return the provenance of a model's token windows by role."""
        return {role: text.provenance for role, text in self.plan.windows[subject].items()}

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return what makes a result repeatable; the same for any number of workers."""
        config = self.config
        tasks = {"tasks": self.tasks()} if len(self.plan.tasks) > 1 else {}
        return {
            "model": config.model,
            "dtype": config.dtype,
            "pruning": config.pruning.model_dump(),
            "texts": self.texts(0),
            **tasks,
            "objective": config.search.objective,
            "seed": config.search.seed,
            "candidates": config.search.candidates,
            **more,
        }

    def tasks(self) -> list[dict[str, Any]]:
        """Return the tasks as JSON: name, model, sparsity, pattern, weight."""
        return [
            {
                "name": task.name,
                "model": self.plan.subjects[task.subject].model,
                "sparsity": task.sparsity,
                "pattern": task.pattern.name if task.pattern else "unstructured",
                "weight": task.weight,
            }
            for task in self.plan.tasks
        ]


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
