"""Prune a model with a metric, verify a pruned model, or measure any model.

torch and transformers, whose import takes seconds, are loaded inside the command.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from prunevolve import command_line
from prunevolve.evaluation.text import CORPORA, EMBEDDED
from prunevolve.pruning.baselines import ALLOCATIONS, NAMED, REFINEMENTS, SPARSEGPT, UPDATES
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.output.options import (
    PROTOCOLS,
    RECIPES,
    WHY_FAST,
    Options,
    read_recipe,
    read_unfinished,
)
from prunevolve.pruning.progress import on_stderr

EXAMPLES = (
    "python run_prune.py --model embedded --metric wanda --out pruned",
    "python run_prune.py --model DIR --metric runs/first --sparsity 0.6 --corpus c4 --out OUT",
    'python run_prune.py --model DIR --metric "mul(W, sqrt(X))" --pattern 2:4 --out pruned',
    "python run_prune.py --recipe pruned/pruning_recipe.json --out again",
    "python run_prune.py --resume again",
    "python run_prune.py --verify pruned",
    "python run_prune.py --evaluate pruned --zero-shot rte,arc_easy",
)


def _option(help: str, *values: str) -> Any:
    """Return an option for which the shell offers these values."""
    return Option(help=help, autocompletion=lambda: list(values))


def prune_model(
    folder: Annotated[
        Path | None, Argument(help="With --resume alone: the unfinished folder.")
    ] = None,
    model: Annotated[str | None, _option("Hub id, folder, or embedded.", EMBEDDED)] = None,
    revision: Annotated[
        str | None, Option(help="Branch, tag or commit of a model from the hub.")
    ] = None,
    metric: Annotated[
        str | None,
        _option("A named metric, a file, a run folder, or a formula.", *NAMED, SPARSEGPT),
    ] = None,
    out: Annotated[Path | None, Option(help="New or empty folder for the result.")] = None,
    sparsity: Annotated[float | None, Option(help="Fraction to remove; default 0.5.")] = None,
    pattern: Annotated[
        str | None,
        _option("unstructured (default), or n:m such as 2:4.", "unstructured", "2:4", "4:8"),
    ] = None,
    group: Annotated[
        str | None, _option("row, layer or model; default the metric's.", "row", "layer", "model")
    ] = None,
    propagation: Annotated[
        str | None, _option("one-shot (default) or sequential.", "one-shot", "sequential")
    ] = None,
    update: Annotated[
        str | None,
        _option("Change what stays: sparsegpt or reconstruct.", *UPDATES),
    ] = None,
    allocation: Annotated[
        str | None,
        _option("Who loses: uniform (default), owl or a JSON file.", *ALLOCATIONS),
    ] = None,
    refine: Annotated[
        str | None,
        _option("Make masks better: swaps, or swaps:N for N in a row at most.", *REFINEMENTS),
    ] = None,
    protocol: Annotated[
        str | None,
        _option("Texts and windows of published tables: wanda-2048 or wanda-4096.", *PROTOCOLS),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        _option("Calibration text; repeat for other kinds of text.", *CORPORA),
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
        _option("Text to measure perplexity on; repeat for others.", *CORPORA),
    ] = None,
    eval_split: Annotated[list[str] | None, Option(help="Its split; one per corpus.")] = None,
    eval_windows: Annotated[
        str | None, Option(help="Windows of each text, or all; default 32 at most.")
    ] = None,
    bos: Annotated[
        bool | None,
        Option("--bos/--no-bos", help="Start windows with bos; default as the tokenizer does."),
    ] = None,
    zero_shot: Annotated[
        str | None,
        Option(help="Tasks of lm-eval, such as rte,arc_easy, or task files, with commas between."),
    ] = None,
    dtype: Annotated[
        str | None,
        _option(
            "Dtype to compute in: float32, bfloat16, float16; default auto, the model's.",
            "auto",
            "float32",
            "bfloat16",
            "float16",
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
        str | None,
        _option(
            "fast (default without a metric), best, a pruning_recipe.json to repeat, or a YAML "
            "file of options; other options override its own.",
            *RECIPES,
        ),
    ] = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue an unfinished folder: --resume DIR.")
    ] = False,
    validate: Annotated[
        bool, Option("--validate", help="Check the request and print the plan; write nothing.")
    ] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
    evaluate: Annotated[
        str | None,
        _option("Measure a model, pruned or not: hub id, folder, or embedded.", EMBEDDED),
    ] = None,
    as_json: Annotated[bool, command_line.JSON_OPTION] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> JsonObject:
    """Prune a model with a metric and save it, --verify a saved one, or --evaluate any."""
    options = Options(
        model=model,
        revision=revision,
        metric=metric,
        sparsity=sparsity,
        pattern=pattern,
        group=group,
        propagation=propagation,
        update=update,
        allocation=allocation,
        refine=refine,
        protocol=protocol,
        corpus=corpus or None,
        split=split or None,
        share=share or None,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        eval_corpus=eval_corpus or None,
        eval_split=eval_split or None,
        eval_windows=_all_or_number(eval_windows),
        bos=bos,
        zero_shot=[task.strip() for task in zero_shot.split(",")] if zero_shot else None,
        dtype=dtype,
    )

    place = out or folder

    def work() -> JsonObject:
        if verify and (options != Options() or out or recipe or evaluate):
            raise ValueError("--verify must stand alone: leave out --model, --metric and --out")
        if folder and (not resume or out):
            raise ValueError(f"unexpected argument {str(folder)!r}: options begin with --")
        if evaluate and (not options.only_measure or out or recipe):
            raise ValueError("--evaluate prunes nothing: leave out --model, --metric and --out")
        chosen = recipe or (None if metric else "fast")
        given, sums = read_recipe(chosen, pattern) if chosen else (Options(), None)
        with on_stderr().status("loading torch and transformers"):
            from prunevolve.pruning.output import command
            from prunevolve.pruning.output.folder import WorkFolder
            from prunevolve.pruning.output.request import make_request
        if verify:
            return command.verify(verify)
        if evaluate:
            return command.evaluate(evaluate, options, device)
        if model and out and not (recipe or metric):
            print(f"note: no --metric given: --recipe fast, {WHY_FAST}", file=sys.stderr)
        told: JsonObject = {}
        if place and resume and options == Options() and not recipe:
            given, told = read_unfinished(WorkFolder(place).asked)
            sums = told["sha256"]
        request = make_request(
            options.over(given),
            place,
            device or told.get("device"),
            max_memory or told.get("max_memory"),
            statistics or (Path(kept) if (kept := told.get("statistics")) else None),
            resume,
        )
        return command.validate(request) if validate else command.apply(request, resume, sums)

    return _run(work, place)


def _all_or_number(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.removeprefix("-").isdecimal():
        raise BadParameter(f"must be all or a number, got {text!r}", param_hint="--eval-windows")
    return int(text)


def _run(work: Callable[[], JsonObject], out: Path | None) -> JsonObject:
    """Do the work and return its outcome; say after an interrupt how to go on."""
    try:
        return command_line.outcome(command_line.DONE, **work())
    except KeyboardInterrupt:
        started = out is not None and out.is_dir() and any(out.iterdir())
        way_on = "run the same command again"
        if started:
            way_on = f"continue with python run_prune.py --resume {shlex.quote(str(out))}"
        return command_line.interrupted(f"interrupted; {way_on}")


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
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
