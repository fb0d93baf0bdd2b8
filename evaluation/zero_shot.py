"""Zero-shot tasks: a language model's accuracy on the tasks of lm-eval, or on task files for it.

lm-eval (EleutherAI's Language Model Evaluation Harness) writes the questions and counts. Where a
task has both, `acc` takes the answer with the highest log-likelihood for the model's, and
`acc_norm` that with the highest one per character. They differ by several points, so that each is
a row of its own here. A figure compares only with one of the same version of the task, and its
standard error says how much other questions of the kind would change it.

lm-eval is an extra of the package, and its import takes seconds: functions import it.
"""

import copy
import difflib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = {"cpu": 1, "cuda": 8, "mps": 8}
"""Requests in a batch by type of device. lm-eval makes the logits of a whole batch at once, and a
CPU gains only a quarter of the time by eight."""

Row = dict[str, Any]
"""One metric of one task, as JSON: task, version, metric, examples; dataset, config, split; value
and stderr, which are None where there is none."""

Tasks = Mapping[str, Any]
"""What lm-eval loaded, by the name that was asked for: a task, or a group of them."""


def check_tasks(names: Sequence[str]) -> None:
    """Check what can be checked without reading a data set.

    Args:
        names: Of lm-eval's tasks, groups and tags, or paths of task files, which end in .yaml.

    Raises:
        ValueError: If lm-eval is not installed, it has no such task, or there is no such file.
    """
    if names and not find_spec("lm_eval"):
        raise ValueError(
            "zero-shot tasks need lm-eval, which is not installed: "
            "pip install 'prunevolve[zero-shot]'"
        )
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise ValueError(f"zero-shot task file {name!r} is not there")
        if not _is_file(name) and name not in (known := _manager(True).all_tasks):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? or " if near else ""
            raise ValueError(
                f"zero-shot task {name!r} is none of lm-eval's: {hint}give one of its tasks, or a "
                "task file that ends in .yaml"
            )


def load_tasks(names: Sequence[str]) -> Tasks:
    """Read tasks and their data sets; those of lm-eval's own come from the Hugging Face hub.

    Raises:
        ValueError: If a data set cannot be had, or a task file is wrong.
    """
    tasks = {}
    for name in names:
        manager = _manager(not _is_file(name))
        try:
            with _silence():
                tasks[name] = manager.load([name])
        except Exception as error:  # a task file and the code beside it can be wrong in any way
            cause = " ".join(str(error).split())[:200]
            raise ValueError(
                f"zero-shot task {name!r} or its data set cannot be loaded "
                f"({type(error).__name__}: {cause}): load it once where the Hugging Face hub can "
                "be reached, or give a task file with data of your own"
            ) from error
        for task in tasks[name]["tasks"].values():
            task.set_config(key="num_fewshot", value=0)  # some have examples unless told otherwise
    return tasks


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Iterator[tuple[str, list[Row]]]:
    """Yield each task's name with its rows, as soon as they are known.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: The model's; it is not changed.
        on_progress: Called with the task's name, the answers scored and all there are.
    """
    if not tasks:
        return
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _silence():
        harness = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a token for padding
            backend="causal",
            batch_size=BATCH[model.device.type],
            trust_remote_code=False,
        )
    for name, task in tasks.items():
        harness.set_cache_hook(_Counter(task["tasks"].values(), partial(on_progress, name)))
        with _silence():
            results = evaluate(
                lm=harness, task_dict=task, log_samples=False, confirm_run_unsafe_code=False
            )
        yield name, list(_rows(results))


def summary(by_model: Mapping[str, Sequence[Row]], dtype: str) -> dict[str, Any]:
    """Return what a report says under `zero_shot`; nothing where there are no tasks.

    Args:
        by_model: The rows of each model on the same tasks. Their `value` and `stderr` become, for a
            model called dense, `dense` and `dense_stderr`, so that models stand side by side.
        dtype: That the models computed in.
    """
    results: list[Row] = []
    for rows in zip(*by_model.values(), strict=True):
        row = {key: cell for key, cell in rows[0].items() if key not in ("value", "stderr")}
        for model, found in zip(by_model, rows, strict=True):
            assert all(found[key] == row[key] for key in ("task", "version", "metric"))
            row |= {model: found["value"], f"{model}_stderr": found["stderr"]}
        results.append(row)
    if not results:
        return {}
    harness = f"lm-eval {metadata.version('lm-eval')}"
    return {"zero_shot": {"harness": harness, "dtype": dtype, "results": results}}


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return what `summary` put into a report as text, a table in Markdown; empty without tasks."""
    if not (about := report.get("zero_shot")):
        return []
    models = [key.removesuffix("_stderr") for key in about["results"][0] if "_stderr" in key]
    head = ("task", "version", "metric", "examples")
    cells = [[*head, *models]]
    for row in about["results"]:
        values = [_text(row[model], row[f"{model}_stderr"]) for model in models]
        cells.append([*("" if row[key] is None else str(row[key]) for key in head), *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        f"Zero-shot by {about['harness']}, {about['dtype']}; ± is one standard error:",
        "",
        *(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells),
    ]


def _text(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".yaml"


@cache
def _manager(with_own: bool) -> Any:
    """Return what knows lm-eval's own tasks, or none of them: reading the list takes seconds."""
    from lm_eval.tasks import TaskManager

    with _silence():
        return TaskManager(include_defaults=with_own)


def _rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """Yield a row for each metric of each task, and of each group that has figures of its own."""
    for task, values in results["results"].items():
        config = results["configs"].get(task, {})
        of_task = {
            "task": task,
            "version": results["versions"].get(task),
            "examples": results["n-samples"].get(task, {}).get("effective"),
            "dataset": config.get("dataset_path"),
            "config": config.get("dataset_name"),
            "split": config.get("test_split") or config.get("validation_split"),
        }
        for key, value in values.items():
            name, comma, answers = key.partition(",")
            if comma and not name.endswith("_stderr"):
                metric = name if answers == "none" else f"{name} ({answers})"
                stderr = _finite(values.get(f"{name}_stderr,{answers}"))
                yield of_task | {"metric": metric, "value": _finite(value), "stderr": stderr}


def _finite(value: object) -> float | None:
    """Return a figure that JSON can hold; None for infinity, and for lm-eval's text `N/A`."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


class _Counter:
    """Counts the answers to tasks: stands where lm-eval tells a cache of each of them."""

    def __init__(self, tasks: Iterable[Any], on_progress: Callable[[int, int], None]) -> None:
        self._tasks, self._on_progress = tasks, on_progress
        self._done = self._total = 0

    def add_partial(self, *answer: object) -> None:
        """Take note of an answer; the requests are known when the first one comes."""
        self._total = self._total or sum(
            request.repeats for task in self._tasks for request in task.instances
        )
        self._done += 1
        self._on_progress(self._done, self._total)


class _Nowhere(io.TextIOBase):
    """Drops text; log handlers may keep it, so that it is never closed as the null device is."""

    def write(self, text: str) -> int:
        """Return what a file returns."""
        return len(text)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what lm-eval and the libraries under it print: bars, log lines, warnings."""
    nowhere = _Nowhere()
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
