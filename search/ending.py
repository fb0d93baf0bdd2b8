"""How a request to the search ended: its exit code, its reason, the results in its run folder.

Imports nothing that is slow to load.
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
"""Files of a run folder that `--json` names, if they exist."""

SHOWN = ("verdict", "dense", "baselines", "best", "candidates", "outcomes", "perplexity_of")
"""Keys that `--json` repeats from a run's summary, or from its status if it is not finished."""


@dataclass(frozen=True)
class Ending:
    """The result of a request.

    Attributes:
        code: The exit code.
        reason: The result in a few words, or an error's line.
        folder: The run folder, if there is one.
        more: Further fields for `--json`.
    """

    code: int
    reason: str
    folder: Path | None = None
    more: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that `--json` prints."""
        reason_key = "error" if self.code else "ending"
        fields = outcome(self.code, **{reason_key: self.reason}, **self.more)
        if self.folder is None or not self.folder.is_dir():
            return fields
        files = {name: self.folder / file for name, file in FILES.items()}
        fields["folder"] = str(self.folder)
        fields["files"] = {name: str(path) for name, path in files.items() if path.is_file()}
        summary, status = (_read(self.folder / name) for name in ("summary.json", "status.json"))
        # If the run was extended since, the summary does not cover all its candidates.
        result = summary if summary.get("candidates") == status.get("candidates") else status
        fields |= {key: result[key] for key in SHOWN if key in result and key not in fields}
        return fields


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, MOST_BYTES) if path.is_file() else {}
