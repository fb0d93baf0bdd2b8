"""Run and resume a search from Python, as `run_search.py` does; see docs/PYTHON.md."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from prunevolve.configs.schema import Config
from prunevolve.configs.schema import load as read_config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.parse import read_metric
from prunevolve.search import run
from prunevolve.search.progress import OnRecord, ignore
from prunevolve.search.records import Record
from prunevolve.search.results import read_summary
from prunevolve.search.run import Unfinished
from prunevolve.search.run_folder import RunFolder

__all__ = ["Record", "Result", "Unfinished", "evolve", "read_config", "resume"]


@dataclass(frozen=True)
class Result:
    """A finished search.

    Attributes:
        folder: The run's folder, from which it can be extended.
        best: The winner on the selection text.
        summary: What `summary.json` holds.
    """

    folder: Path
    best: Criterion
    summary: JsonObject


def evolve(config: Config, out: Path | str, on_record: OnRecord = ignore) -> Result:
    """Run a new search to its end without printing anything.

    Args:
        config: As `read_config` returns it.
        out: The run's folder, which must be empty or not exist.
        on_record: Called with each candidate and its outcome once they are in the journal, in the
            order of breeding. If it raises, the run stops after a checkpoint; `resume` continues.

    Raises:
        Unfinished: If the run stopped early: workers or disk failed, or nothing was evaluated.
        FolderError: If the folder is not empty or cannot be created.
        ValueError: If something is wrong with the config.
    """
    return _finish(Path(out), lambda console: run.launch(config, Path(out), console, on_record))


def resume(
    folder: Path | str, overrides: Sequence[str] = (), on_record: OnRecord = ignore
) -> Result:
    """Continue a run to its end, or extend a finished one.

    Args:
        folder: The run's folder.
        overrides: Such as `search.candidates=500`; those that would change the search are refused.
        on_record: As in `evolve`; called with new records only.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
        Unfinished: As in `evolve`.
    """
    path = Path(folder)
    return _finish(path, lambda console: run.resume(path, overrides, console, on_record))


def _finish(path: Path, work: Callable[[Console], object]) -> Result:
    try:
        work(Console(file=io.StringIO()))  # not where progress would mix with the caller's output
    except Unfinished as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt(str(error)) from error  # stops the caller, too
        raise
    best = read_metric(str(path / "best_metric.json"))
    return Result(path, best, read_summary(RunFolder.look(path)))
