"""How a request to the search ended: its exit code, its reason, what its run folder has to show.

Imports nothing that takes long.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import outcome
from plain_files import read_object

MOST_BYTES = 20_000_000
FILES = {
    "config": "config.yaml",
    "journal": "journal.jsonl",
    "best_metric": "best_metric.json",
    "summary": "summary.json",
    "report": "report.html",
}
"""What of a run folder `--json` names, if it is there."""

SHOWN = ("verdict", "dense", "baselines", "best", "candidates", "outcomes", "perplexity_of")
"""What `--json` repeats of a run's summary; of one that is not finished, of its status."""


@dataclass(frozen=True)
class Ending:
    """What a request came to.

    Attributes:
        code: The exit code.
        reason: What came of it in a few words, or an error's line.
        folder: The run's, if there is one.
        more: What `--json` says beside these.
    """

    code: int
    reason: str
    folder: Path | None = None
    more: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        what = "error" if self.code else "ending"
        told = outcome(self.code, **{what: self.reason}, **self.more)
        if self.folder is None or not self.folder.is_dir():
            return told
        files = {name: self.folder / file for name, file in FILES.items()}
        told["folder"] = str(self.folder)
        told["files"] = {name: str(path) for name, path in files.items() if path.is_file()}
        summary, status = (_read(self.folder / name) for name in ("summary.json", "status.json"))
        # The summary of a run that was extended since is not of all its candidates.
        result = summary if summary.get("candidates") == status.get("candidates") else status
        told |= {key: result[key] for key in SHOWN if key in result and key not in told}
        return told


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, MOST_BYTES) if path.is_file() else {}
