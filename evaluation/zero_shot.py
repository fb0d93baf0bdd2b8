"""Zero-shot tasks: a language model's accuracy on the tasks of lm-eval, or on task files for it.

lm-eval (EleutherAI's Language Model Evaluation Harness) writes the questions and counts. Where a
task has both, `acc` takes the answer with the highest log-likelihood for the model's, and
`acc_norm` that with the highest one per character. They differ by several points. A figure compares
only with one of the same version of the task, and its standard error says how much other questions
of the kind would change it.

lm-eval is an extra of the package, and its import takes seconds: functions import it.
"""

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunevolve import extras

BATCH = {"cpu": 1, "cuda": 8, "mps": 8}
"""Requests in a batch by type of device. lm-eval makes the logits of a whole batch at once, and a
CPU gains only a quarter of the time by eight."""

Tasks = dict[str, Any]
"""What lm-eval loaded; empty where nothing was asked for."""

Scores = dict[str, Any]
"""A model's figures as JSON: `harness`; `results`, a row of task, version, metric, value and stderr
for each metric, the last two perhaps None; and `table`, lm-eval's own in Markdown."""


def check_tasks(names: Sequence[str]) -> None:
    """Check what can be checked without reading a data set.

    Args:
        names: Of lm-eval's tasks, groups and tags, or paths of task files, which end in .yaml.

    Raises:
        ModuleNotFoundError: If lm-eval is not installed.
        ValueError: If it has no such task, or there is no such file.
    """
    if names:
        extras.require("zero-shot", "lm_eval")
    for name in names:
        if _is_file(name) and not Path(name).is_file():
            raise ValueError(f"zero-shot task file {name!r} is not there")
        if not _is_file(name) and name not in (known := _manager(with_own=True).all_tasks):
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
    if not names:
        return {}
    try:
        tasks: Tasks = _manager(with_own=not all(map(_is_file, names))).load(list(names))
    except Exception as error:  # a task file and the code beside it can be wrong in any way
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"zero-shot tasks {', '.join(names)} or their data sets cannot be loaded "
            f"({type(error).__name__}: {cause}): load them once where the Hugging Face hub can be "
            "reached, or give task files with data of your own"
        ) from error
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)  # some have examples unless told otherwise
    return tasks


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks
) -> Scores:
    """Measure a model on tasks.

    Args:
        model: In evaluation mode, on its device.
        tokenizer: The model's; it is not changed.
        tasks: What `load_tasks` returned for at least one name.
    """
    from lm_eval import evaluate  # simple_evaluate sets global seeds and runs git and pip, too
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    harness = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it may be given a token for padding
        backend="causal",
        batch_size=BATCH[model.device.type],
        trust_remote_code=False,
    )
    results = evaluate(harness, tasks, log_samples=False)
    return {
        "harness": f"lm-eval {metadata.version('lm-eval')}",
        "results": list(_rows(results)),
        "table": make_table(results),
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return what a report has under `zero_shot`, scores by model, as text; empty without tasks."""
    text = []
    for model, scores in report.get("zero_shot", {}).items():
        heading = f"Zero-shot of the {model} model by {scores['harness']}:"
        text += [heading, "", *scores["table"].splitlines(), ""]
    return text


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".yaml"


@cache
def _manager(with_own: bool) -> Any:
    """Return what knows lm-eval's own tasks, or none of them: reading the list takes seconds."""
    from lm_eval.tasks import TaskManager

    # It warns of defaults that task files and the calls above rely on.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=with_own)


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of each task, and of each group that has figures of its own."""
    for task, values in results["results"].items():
        for key, value in values.items():
            name, comma, answers = key.partition(",")
            if comma and not name.endswith("_stderr"):
                yield {
                    "task": task,
                    "version": results["versions"].get(task),
                    "metric": name if answers == "none" else f"{name} ({answers})",
                    "value": _finite(value),
                    "stderr": _finite(values.get(f"{name}_stderr,{answers}")),
                }


def _finite(value: object) -> float | None:
    """Return a figure that JSON can hold; None for infinity, and for lm-eval's text `N/A`."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
