"""Prune a model with a metric, or check a model that was pruned so.

Exit codes: 0 done, 2 a mistake in the request, 3 interrupted and resumable, 4 the folder does not
fit the request. What the words of a request tell is checked first; torch and transformers, which
take seconds, are imported after that.
"""

import sys

import command_line

if __name__ == "__main__":
    command_line.leave_on_signals()  # before what takes long to import

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
    """Return what a shell completes an option's value from."""
    return lambda: list(values)


def prune_model(
    model: Annotated[
        str | None,
        Option(help="Hub id, folder, or embedded.", autocompletion=_one_of(EMBEDDED)),
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
            help="row, layer, model; default the metric's.",
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
            help="Calibration text; again for other kinds of text.",
            autocompletion=_one_of(EMBEDDED, *HUB_CORPORA),
        ),
    ] = None,
    split: Annotated[
        list[str] | None, Option(help="Its split, with or without a slice; one a corpus.")
    ] = None,
    share: Annotated[
        list[float] | None, Option(help="Its share of the windows; one a corpus.")
    ] = None,
    samples: Annotated[int | None, Option(help="Calibration windows; default 128.")] = None,
    seqlen: Annotated[
        int | None, Option(help="Tokens per window; default 512, for embedded 256.")
    ] = None,
    seed: Annotated[int | None, Option(help="Draws the calibration windows; default 0.")] = None,
    eval_corpus: Annotated[
        list[str] | None,
        Option(
            help="Text that perplexity is measured on; again for others.",
            autocompletion=_one_of(EMBEDDED, *HUB_CORPORA),
        ),
    ] = None,
    eval_split: Annotated[list[str] | None, Option(help="Its split; one a corpus.")] = None,
    eval_windows: Annotated[int | None, Option(help="Of each; default: 32, or all.")] = None,
    bos: Annotated[
        bool | None, Option("--bos/--no-bos", help="Windows begin with bos; default the model's.")
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Of the passes: float32, bfloat16, float16; default auto, the model's.",
            autocompletion=_one_of("auto", "float32", "bfloat16", "float16"),
        ),
    ] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1; default cuda or cpu.")] = None,
    max_memory: Annotated[str | None, Option(help="Such as 6GiB; default what is free.")] = None,
    statistics: Annotated[
        Path | None, Option(help="Folder to keep statistics in and reuse; or a .pth file of G.")
    ] = None,
    recipe: Annotated[
        Path | None,
        Option(help="A pruning_recipe.json: prune so again; other options go over its."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with an unfinished folder.")] = False,
    validate: Annotated[bool, Option("--validate", help="Check and plan; write nothing.")] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
    as_json: Annotated[bool, command_line.json_option()] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> dict[str, Any]:
    """Prune a model with a metric and save it, or --verify a folder that was saved so.

    Exit codes: 0 done; 2 usage; 3 interrupted, resumable; 4 the folder does not fit this request.
    """
    given = Options(
        *(model, metric, sparsity, pattern, group, propagation),
        *(_all(corpus), _all(split), _all(share), samples, seqlen, seed),
        *(_all(eval_corpus), _all(eval_split), eval_windows, bos, dtype),
    )

    if verify:
        alone = given == Options() and not (out or recipe)
        return _ended(lambda: _verify(verify, alone), out)
    settings = (device, max_memory, statistics, resume)
    return _ended(lambda: _prune(given, out, recipe, settings, validate), out)


def _verify(folder: Path, alone: bool) -> dict[str, Any]:
    if not alone:
        raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
    with step(LOADING):
        import apply_metric
    return apply_metric.verify(folder)


def _prune(
    given: Options,
    out: Path | None,
    recipe: Path | None,
    settings: tuple[str | None, str | None, Path | None, bool],
    validate: bool,
) -> dict[str, Any]:
    """Carry a request out, or plan it alone.

    Args:
        settings: What decides nothing of the result: device, max_memory, statistics and resume.
    """
    repeated, sums = read_recipe(recipe) if recipe else (Options(), None)
    options = given.over(repeated)
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


def _ended(run: Callable[[], Mapping[str, Any]], out: Path | None) -> dict[str, Any]:
    """Run to the end; return what came of it, a mistake and an interrupt said in one line."""
    try:
        return command_line.outcome(command_line.DONE, **run())
    except ValueError as error:
        return command_line.failed(getattr(error, "exit_code", command_line.USAGE), error)
    except KeyboardInterrupt:
        begun = out is not None and out.is_dir() and any(out.iterdir())
        what = f"{str(out)!r} is not finished; " if out else ""
        line = f"interrupted: {what}run the same command again{' with --resume' * begun}"
        print(line, file=sys.stderr)
        return command_line.outcome(command_line.INTERRUPTED, error=line)


app = command_line.make_app(prune_model, EXAMPLES)


def main() -> None:
    """Console entry: runs the command, and says a mistake in its options in one line too."""
    keep_freed_memory()
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
