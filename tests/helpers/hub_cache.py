"""A hub that is only a cache: owner/tiny with two commits of different weights."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from toy_models import toy_model

FIRST, SECOND = "1" * 40, "2" * 40


@dataclass(frozen=True)
class HubCache:
    """The folder that `HF_HUB_CACHE` names."""

    path: Path

    def point_main_at(self, commit: str) -> None:
        """Say which commit the main branch is at."""
        (self._repository / "refs/main").write_text(commit, encoding="utf-8")

    def fill(self, files: Path) -> None:
        """Copy a model's files, with weights of its own for each commit."""
        for seed, commit in enumerate((FIRST, SECOND)):
            snapshot = self._repository / "snapshots" / commit
            shutil.copytree(files, snapshot)
            settings = {"vocab_size": 256, "tie_word_embeddings": True}
            toy_model("llama", seed=seed, **settings).save_pretrained(snapshot)
        (self._repository / "refs").mkdir()

    @property
    def _repository(self) -> Path:
        return self.path / "models--owner--tiny"
