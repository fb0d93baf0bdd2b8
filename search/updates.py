"""The winner beside and with what changes the weights that stay: SparseGPT and reconstruction."""

from pathlib import Path
from tempfile import TemporaryDirectory

from prunevolve.configs import schema
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.run import command, job
from prunevolve.pruning.run.options import Request, make
from prunevolve.search.next_steps import options_of
from prunevolve.search.results import read_summary
from prunevolve.search.run_folder import FolderError, RunFolder

UPDATES = {
    "this metric": {},
    "sparsegpt": {"metric": SPARSEGPT},
    "this metric, update sparsegpt": {"update": "sparsegpt"},
    "this metric, update reconstruct": {"update": "reconstruct"},
}
"""What differs from pruning the search's first task with its metric, by name."""


def measure_updates(folder: RunFolder) -> None:
    """Prune and measure the first task's model with each, and write that to `summary.json`.

    The windows are as many as the report's, and as long as those of the calibration.

    Raises FolderError if the run is not finished.
    """
    if not folder.is_finished(len(folder.told())):
        raise FolderError(f"{folder.path} is not finished: --recipes needs its metric")
    options, measured = options_of(folder, schema.load(folder.path / "config.yaml", [])), {}
    with TemporaryDirectory(dir=folder.path, prefix=".updates-") as temporary:
        for place, (name, other) in enumerate(UPDATES.items()):
            out = Path(temporary) / str(place)
            request = make(Request, {**options, **other, "out": str(out)}, "options")
            report: JsonObject = command.apply(job.make_job(request, resume=False), None)
            measured[name] = report["pruned_perplexity"]
    folder.write_json("summary.json", read_summary(folder) | {"updates": measured})
