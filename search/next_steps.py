"""What comes after a search: the commands that apply its metric, search on, and measure more."""

import shlex

from prunevolve.command_line import PRUNE, SEARCH
from prunevolve.configs.schema import Config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.search.run_folder import RunFolder


def commands_of(folder: RunFolder, config: Config) -> tuple[str, str, str]:
    """Return how to apply the best metric to the same model and texts, how to search on, and how
    to measure it with what changes the weights that stay.
    """
    words = [
        _word(name.replace("_", "-"), value)
        for name, values in (options_of(folder, config) | {"out": "DIR"}).items()
        if name != "eval_windows"
        for value in (values if isinstance(values, list) else [values])
    ]
    more = f"search.candidates={2 * config.search.candidates}"
    path = shlex.quote(str(folder.path))
    search_on = f"{SEARCH} --resume {path} --set {more}"
    return " ".join([PRUNE, *words]), search_on, f"{SEARCH} --report {path} --recipes"


def _word(name: str, value: object) -> str:
    """Return an option with its value, or a flag."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def options_of(folder: RunFolder, config: Config) -> JsonObject:
    """Return the options that prune the first task's model with the best metric, as the run did."""
    task = config.tasks[0]
    calibration, report_text = task.calibration, task.report
    unstructured = task.pattern == "unstructured"
    options = {
        "model": task.model,
        "metric": str(folder.path / "best_metric.json"),
        "sparsity": task.sparsity if unstructured else None,
        "pattern": None if unstructured else task.pattern,
        "corpus": calibration.corpus,
        "split": calibration.split,
        "share": calibration.share,
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "bos": calibration.bos,
        "eval_corpus": report_text.corpus,
        "eval_split": report_text.split,
        "eval_windows": report_text.windows,
        "dtype": task.dtype,
    }
    return {name: value for name, value in options.items() if value is not None}
