"""Zero-shot tasks of lm-eval, EleutherAI's evaluation harness, or files for it.

`acc` takes the answer with the highest log-likelihood for the model's, `acc_norm` the highest per
character: they differ by several points. Compare only figures of the same version of a task.
"""

import copy
import difflib
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunevolve.evaluation.perplexity import Report

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

Tasks = dict[str, Any]  # what lm-eval loaded; empty where nothing was asked for
Scores = Report  # a model's figures as JSON: `harness`, `results`, `table` in Markdown


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is neither lm-eval's nor a task file, ending in .yaml."""
    known = _manager(*names).all_tasks if names else []
    for name in names:
        if name not in known and not Path(name).is_file():
            near = [*difflib.get_close_matches(name, known, n=1), "a file that ends in .yaml"]
            way_out = " or ".join(near)
            raise ValueError(f"zero-shot task {name!r} is unknown or missing: give {way_out}")


def load_tasks(names: Sequence[str]) -> Tasks:
    """Read tasks and their data sets; raises ValueError if one cannot be had or a file is wrong."""
    if not names:
        return {}
    try:
        tasks: Tasks = _manager(*names).load(list(names))
    except Exception as error:  # a task file and the code beside it can be wrong in any way
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"zero-shot tasks {', '.join(names)} cannot be loaded ({cause}): load them once where "
            "the Hugging Face hub can be reached, or give files with your own data"
        ) from error
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)  # some have examples unless told otherwise
    return tasks


def evaluate_tasks(model: PreTrainedModel, tokenizer: Tokenizer, tasks: Tasks) -> Scores:
    """Measure a model, in evaluation mode and on its device, on tasks that were loaded."""
    # Not simple_evaluate, which sets global seeds and runs git and pip.
    from lm_eval import __version__, evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    def finite(value: object) -> float | None:
        # None for what JSON cannot hold, and for lm-eval's text `N/A`.
        return value if isinstance(value, float) and math.isfinite(value) else None

    own = copy.deepcopy(tokenizer)  # it may be given a token for padding
    # The logits of a whole batch are made at once; a CPU gains only a quarter of the time by 8.
    batch = 1 if model.device.type == "cpu" else 8
    harness = HFLM(model, "causal", tokenizer=own, batch_size=batch, trust_remote_code=False)
    results = evaluate(harness, tasks, log_samples=False)
    rows = [
        {
            "task": task,
            "version": results["versions"].get(task),
            "metric": key.removesuffix(",none"),
            "value": finite(value),
            "stderr": finite(values.get(key.replace(",", "_stderr,"))),
        }
        for task, values in results["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key
    ]
    return {"harness": f"lm-eval {__version__}", "results": rows, "table": make_table(results)}


def lines(report: Report) -> list[str]:
    """Return what a report has under `zero_shot`, scores by model, as text; empty without tasks."""
    text = ""
    for model, scores in report.get("zero_shot", {}).items():
        text += f"Zero-shot of the {model} model by {scores['harness']}:\n\n{scores['table']}\n"
    return text.splitlines()


@cache
def _manager(*names: str) -> "TaskManager":
    """Return what loads tasks; it reads the list of lm-eval's own, for seconds, if one is named."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that are meant
    return TaskManager(include_defaults=any(Path(name).suffix != ".yaml" for name in names))
