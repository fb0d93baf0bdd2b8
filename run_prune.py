"""Prune a model with a metric, or verify a pruned model.

Options are checked before torch and transformers are imported, which takes seconds.
"""

import sys

import command_line

if __name__ == "__main__":
    command_line.leave_on_signals()  # before the slow imports

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from evaluation.sources import EMBEDDED, HUB_CORPORA, check_name
from pruning.baselines import NAMED
from pruning.memory import keep_freed_memory
from pruning.progress import step
from pruning.result.options import Options, read_recipe, required

EXAMPLES = (
    "prunevolve-prune --model embedded --metric wanda --out pruned",
    "prunevolve-prune --model DIR --metric runs/embedded --sparsity 0.6 --corpus c4 --out pruned",
    'prunevolve-prune --model DIR --metric "mul(W, sqrt(X))" --pattern 2:4 --out pruned',
    "prunevolve-prune --recipe pruned/pruning_recipe.json --out again",
    "prunevolve-prune --verify pruned",
)


LOADING = "loading torch and transformers"


def _one_of(*values: str) -> Callable[[], list[str]]:
    """Return a completion function that offers these values."""
    return lambda: list(values)


def prune_model(
    model: Annotated[
        str | None,
        Option(help="Hub id, folder, or embedded.", autocompletion=_one_of(EMBEDDED)),
    ] = None,
    revision: Annotated[
        str | None, Option(help="Branch, tag or commit of a model from the hub.")
    ] = None,
    metric: Annotated[
        str | None,
        Option(
            help="A named metric, a file, a run folder, or a formula.",
            autocompletion=_one_of(*NAMED),
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="New or empty folder for the result.")] = None,
    sparsity: Annotated[float | None, Option(help="Fraction to remove; default 0.5.")] = None,
    pattern: Annotated[
        str | None,
        Option(
            help="unstructured (default), or n:m such as 2:4.",
            autocompletion=_one_of("unstructured", "2:4", "4:8"),
        ),
    ] = None,
    group: Annotated[
        str | None,
        Option(
            help="row, layer or model; default the metric's.",
            autocompletion=_one_of("row", "layer", "model"),
        ),
    ] = None,
    propagation: Annotated[
        str | None,
        Option(
            help="one-shot (default) or sequential.",
            autocompletion=_one_of("one-shot", "sequential"),
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        Option(
            help="Calibration text; repeat for other kinds of text.",
            autocompletion=_one_of(EMBEDDED, *HUB_CORPORA),
        ),
    ] = None,
    split: Annotated[
        list[str] | None, Option(help="Its split, with or without a slice; one per corpus.")
    ] = None,
    share: Annotated[
        list[float] | None, Option(help="Its share of the windows; one per corpus.")
    ] = None,
    samples: Annotated[int | None, Option(help="Calibration windows; default 128.")] = None,
    seqlen: Annotated[
        int | None, Option(help="Tokens per window; default 512, or 256 for embedded.")
    ] = None,
    seed: Annotated[
        int | None, Option(help="Seed for drawing calibration windows; default 0.")
    ] = None,
    eval_corpus: Annotated[
        list[str] | None,
        Option(
            help="Text to measure perplexity on; repeat for others.",
            autocompletion=_one_of(EMBEDDED, *HUB_CORPORA),
        ),
    ] = None,
    eval_split: Annotated[list[str] | None, Option(help="Its split; one per corpus.")] = None,
    eval_windows: Annotated[
        int | None, Option(help="Windows of each text; default 32, or all.")
    ] = None,
    bos: Annotated[
        bool | None,
        Option("--bos/--no-bos", help="Start windows with bos; default as the tokenizer does."),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype to compute in: float32, bfloat16, float16; default auto, the model's.",
            autocompletion=_one_of("auto", "float32", "bfloat16", "float16"),
        ),
    ] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default cuda or cpu.")] = None,
    max_memory: Annotated[
        str | None, Option(help="Memory limit, such as 6GiB; default all that is free.")
    ] = None,
    statistics: Annotated[
        Path | None, Option(help="Folder to keep and reuse statistics in; or a .pth file of G.")
    ] = None,
    recipe: Annotated[
        Path | None,
        Option(help="A pruning_recipe.json to repeat; other options override its own."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue an unfinished folder.")] = False,
    validate: Annotated[
        bool, Option("--validate", help="Check the request and print the plan; write nothing.")
    ] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
    as_json: Annotated[bool, command_line.json_option()] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> dict[str, Any]:
    """Prune a model with a metric and save it, or --verify a saved one."""
    options = Options(
        *(model, revision, metric, sparsity, pattern, group, propagation),
        *(_all(corpus), _all(split), _all(share), samples, seqlen, seed),
        *(_all(eval_corpus), _all(eval_split), eval_windows, bos, dtype),
    )

    if verify:
        alone = options == Options() and not (out or recipe)
        return _run(lambda: _verify(verify, alone), out)
    settings = (device, max_memory, statistics, resume)
    return _run(lambda: _prune(options, out, recipe, settings, validate), out)


def _verify(folder: Path, alone: bool) -> dict[str, Any]:
    if not alone:
        raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
    with step(LOADING):
        import apply_metric
    return apply_metric.verify(folder)


def _prune(
    options: Options,
    out: Path | None,
    recipe: Path | None,
    settings: tuple[str | None, str | None, Path | None, bool],
    validate: bool,
) -> dict[str, Any]:
    """Carry out a request, or only plan it.

    Args:
        settings: Options that do not affect the result: device, max_memory, statistics and resume.
    """
    recipe_options, sums = read_recipe(recipe) if recipe else (Options(), None)
    options = options.over(recipe_options)
    options.check()
    for corpus in (*(options.corpus or ()), *(options.eval_corpus or ())):
        check_name(corpus)
    folder = Path(required("out", str(out or "")))
    with step(LOADING):
        import apply_metric
    request = apply_metric.make_request(options, folder, *settings)
    if validate:
        return apply_metric.validate(request)
    return apply_metric.apply(request, settings[-1], sums)


def _all(values: list[Any] | None) -> tuple[Any, ...] | None:
    return tuple(values) if values else None


def _run(work: Callable[[], Mapping[str, Any]], out: Path | None) -> dict[str, Any]:
    """Do the work and return its outcome; report a mistake or an interrupt in one line."""
    try:
        return command_line.outcome(command_line.DONE, **work())
    except ValueError as error:
        return command_line.failed(getattr(error, "exit_code", command_line.USAGE), error)
    except KeyboardInterrupt:
        started = out is not None and out.is_dir() and any(out.iterdir())
        state = f"{str(out)!r} is not finished; " if out else ""
        line = f"interrupted: {state}run the same command again{' with --resume' * started}"
        print(line, file=sys.stderr)
        return command_line.outcome(command_line.INTERRUPTED, error=line)


app = command_line.make_app(
    prune_model,
    EXAMPLES,
    {
        command_line.DONE: "done",
        command_line.USAGE: "usage",
        command_line.INTERRUPTED: "interrupted, resumable",
        command_line.WRONG_FOLDER: "the folder does not fit this request",
    },
)


def main() -> None:
    """Console entry: runs the command, and reports a mistake in its options in one line."""
    keep_freed_memory()
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
