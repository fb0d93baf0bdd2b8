"""Prune a model with a metric, verify a pruned model, or measure any model.

torch and transformers, whose import takes seconds, are loaded inside the command.
"""

import shlex
import sys
from functools import partial
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from prunevolve import command_line
from prunevolve.command_line import FolderError
from prunevolve.pruning.baselines import SPARSEGPT
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.progress import on_stderr
from prunevolve.pruning.run import options

EXAMPLES = (
    f"{command_line.PRUNE} --model embedded --metric wanda --out pruned",
    f"{command_line.PRUNE} --model DIR --metric runs/first --sparsity 0.6 --corpus c4 --out OUT",
    f'{command_line.PRUNE} --model DIR --metric "mul(W, sqrt(X))" --pattern 2:4 --out pruned',
    f"{command_line.PRUNE} --recipe pruned/pruning_recipe.json --out again",
    f"{command_line.PRUNE} --resume again",
    f"{command_line.PRUNE} --verify pruned",
    f"{command_line.PRUNE} --evaluate pruned --zero-shot rte,arc_easy",
)
_FOLDER = Argument(help="With --resume alone: the unfinished folder.")
_RECIPE = Option(
    help=f"{', '.join(options.RECIPES)}, a pruning_recipe.json to repeat, or a YAML file of "
    "options; default fast without a metric. Options go over it."
)
_FLAG = partial(Option, metavar="")
_RESUME = _FLAG("--resume", help="Continue an unfinished folder: --resume DIR.")
_VALIDATE = _FLAG("--validate", help="Check the request and print the plan; write nothing.")


def prune_model(
    folder: Annotated[Path | None, _FOLDER] = None,
    recipe: Annotated[str | None, _RECIPE] = None,
    resume: Annotated[bool, _RESUME] = False,
    validate: Annotated[bool, _VALIDATE] = False,
    verify: Annotated[Path | None, Option(help="Check a pruned model's folder.")] = None,
    evaluate: Annotated[str | None, Option(help="Measure any model by id or folder.")] = None,
    as_json: Annotated[bool, command_line.JSON_OPTION] = False,
    version: Annotated[bool, command_line.VERSION_OPTION] = False,
    **asked: object,
) -> JsonObject:
    """Prune a model with a metric and save it, --verify a saved one, or --evaluate any."""
    given = {name: value for name, value in asked.items() if value not in (None, [])}
    out = str(asked["out"] or folder or "")
    if verify and (given or recipe or evaluate or resume or validate):
        raise ValueError("--verify must stand alone: leave out all other options")
    if folder and (not resume or asked["out"]):
        raise ValueError(f"unexpected argument {str(folder)!r}: options begin with --")
    if resume and not out:
        raise ValueError("--resume needs the unfinished folder: give --resume DIR")
    measuring = [name for name in options.Measurement.model_fields if name != "model"]
    if evaluate and (recipe or resume or validate or not given.keys() <= {*measuring}):
        names = ", --".join(measuring).replace("_", "-")
        raise ValueError(f"--evaluate only measures: with it go --{names}")
    # A mistake is refused before torch is imported, or at least before transformers is.
    before = options.read_recipe(recipe, str(asked["pattern"] or "")) if recipe else {}
    goes_on = resume and not before and "model" not in given
    request = None if verify or evaluate or goes_on else _request(given, before)
    measured = _measurement(evaluate, given) if evaluate else None
    options.check_names(request or measured or options.make(options.Request, given, "options"))
    if verify and not (verify / "pruning_report.json").is_file():
        raise FolderError(f"{str(verify)!r} has no pruning_report.json: no finished pruned model")
    if out and not resume:
        options.check_output_folder(Path(out))
    if resume and not Path(out).is_dir():
        raise FolderError(f"{out!r} is no folder: --resume needs an unfinished one")
    try:
        if request:
            _check(request, bool(out or validate))
        with on_stderr().status("loading transformers"):
            from prunevolve.pruning.run import command
        if verify:
            answer = command.verify(verify)
        elif measured:
            answer = command.evaluate(measured)
        else:
            answer = _prune(request, given, out, resume, validate)
        return command_line.outcome(command_line.DONE, **answer)
    except KeyboardInterrupt:
        return command_line.interrupted(f"interrupted; {_way_on(out)}")
    except (MemoryError, RuntimeError) as error:  # of an allocator, a device, CUDA
        what = str(error).partition("\n")[0] or "out of memory"
        why = f"{what}: free memory, or see to the device, and {_way_on(out)}"
        return command_line.failed(command_line.INTERRUPTED, why)


def _check(request: options.Request, has_place: bool) -> None:
    """Refuse a formula, pattern or group that cannot be, before transformers is imported."""
    if not request.model:
        raise ValueError("--model is required: give it or a --recipe that has it")
    if not has_place:
        raise ValueError("--out is required: name a new folder for the result")
    with on_stderr().status("loading torch"):
        from prunevolve.pruning import parse, passes
    criterion = parse.read_metric(str(request.metric))
    passes.procedure_of(request, criterion, own_masks=request.metric == SPARSEGPT)


def _prune(
    request: options.Request | None, given: JsonObject, out: str, resume: bool, validate: bool
) -> JsonObject:
    """Begin a pruning, go on with one, perhaps as its folder says, or only check it."""
    from prunevolve.pruning.run import command, job, result

    if request is None:
        if given.keys() <= {*options.MACHINE} and (answer := command.finished(Path(out))):
            return answer
        request = _request(given, result.Run.read(Path(out)).options)
    planned = job.make_job(request.model_copy(update={"out": out}), resume)
    return command.validate(planned) if validate else command.apply(planned)


def _request(given: JsonObject, before: JsonObject) -> options.Request:
    """Return the request of options over a recipe's, `fast` if there is no metric."""
    wanted = options.over(given, before)
    if "metric" not in wanted:
        wanted = options.read_recipe("fast", wanted.get("pattern")) | wanted
        why = "never behind SparseGPT or Wanda where it was measured; --recipe best takes longer"
        print(f"note: no --metric given: --recipe fast, {why}", file=sys.stderr)
    return options.make(options.Request, wanted, "options")


def _way_on(out: str) -> str:
    if out and Path(out).is_dir() and any(Path(out).iterdir()):
        return f"continue with {command_line.PRUNE} --resume {shlex.quote(out)}"
    return "run the same command again"


def _measurement(model: str, given: JsonObject) -> options.Measurement:
    """Return the request of --evaluate: windows and dtype are those of a pruned model's recipe."""
    if (recipe := Path(model) / "pruning_recipe.json").is_file():
        saved = options.read_recipe(str(recipe), None)
        taken = ("seqlen", "bos", "eval_corpus", "eval_split", "eval_windows", "dtype")
        given = options.over(given, {name: saved[name] for name in taken if name in saved})
        print(f"note: windows and dtype as in {recipe} unless options differ", file=sys.stderr)
    return options.make(options.Measurement, given | {"model": model}, "--evaluate")


# The options that make a request are its fields.
_own = [x for x in signature(prune_model).parameters.values() if x.kind != x.VAR_KEYWORD]
_fields = options.parameters()
prune_model.__signature__ = Signature([*_own, *_fields])  # type: ignore[attr-defined]
prune_model.__annotations__ |= {x.name: x.annotation for x in _fields}

app = command_line.make_app(prune_model, EXAMPLES)


def main() -> None:
    """Console entry: runs the command, and reports a mistake in its options in one line."""
    try:
        command_line.run_to_end(app)
    except SystemExit as end:
        command_line.leave(end)


if __name__ == "__main__":
    main()
