"""What `run_search.py --json` prints about a run. Imports nothing that is slow to load."""

from pathlib import Path
from typing import Any

from pruning.json_file import read_object

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


def about_run(folder: Path) -> dict[str, Any]:
    """Return the run's folder, its files and its results so far; nothing if there is no folder."""
    if not folder.is_dir():
        return {}
    files = {name: str(folder / file) for name, file in FILES.items() if (folder / file).is_file()}
    summary, status = (_read(folder / name) for name in ("summary.json", "status.json"))
    # If the run was extended since, the summary does not cover all its candidates.
    results = summary if summary.get("candidates") == status.get("candidates") else status
    shown = {key: results[key] for key in SHOWN if key in results}
    return {"folder": str(folder), "files": files, **shown}


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
