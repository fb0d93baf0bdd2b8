"""Search for a pruning metric: launch, resume, validate, rebuild a report."""

import sys
from contextlib import ExitStack

import interrupts

_signals = ExitStack()
if interrupts.is_program(__name__, "prunevolve-search"):
    _signals.enter_context(interrupts.stoppable())  # before what takes long to import

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from command_line import USAGE, Json, Version, application, fail, print_json
from configs import schema
from configs.schema import Config
from search.ending import DONE, Ending
from search.names import check_hub, check_names

_INTERRUPTED_BY_TYPER = 130


def command(
    config: Annotated[
        Path | None, Option(help="YAML experiment; none: the embedded default.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="Empty folder of the run; none: a new one in runs/.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Over the config; repeatable: search.seed=1."),
    ] = None,
    resume: Annotated[
        Path | None, Option(help="Continue the run in this folder, or extend a finished one.")
    ] = None,
    validate: Annotated[
        bool, Option("--validate", help="Check all that needs no work, and print the plan.")
    ] = False,
    report: Annotated[
        Path | None, Option(help="Rebuild report.html of the run in this folder, even amid it.")
    ] = None,
    status: Annotated[
        Path | None, Option(help="Print where the run in this folder stands.")
    ] = None,
    json: Json = False,
    version: Version = False,
) -> None:
    """Evolve a symbolic pruning metric.

    \b
    Examples:
      run_search.py                              # the embedded model, no download
      run_search.py --config configs/smollm2_135m.yaml --out runs/first
      run_search.py --set search.seed=1 --set pruning.sparsity=0.7
      run_search.py --config configs/llama2_7b.yaml --validate
      run_search.py --resume runs/first --set search.candidates=5000

    \b
    Exit codes:
      0 done
      2 usage or config
      3 interrupted, resumable
      4 the folder does not fit this request
      5 no evaluation succeeded
    """
    console, words = Console(highlight=False, markup=False, stderr=json), overrides or []
    try:
        _check_usage(config, out, resume, validate, report or status, bool(overrides))
        if status:
            ending = _show_status(status, console)
        elif report:
            ending = _rebuild_report(report, console)
        elif resume:
            ending = _resume(resume, words, console)
        else:
            # What takes long is imported later: a mistake in a config is answered at once.
            resolved = schema.load(config, words)
            check_names(resolved)
            folder = out or _new_folder(config)
            ending = (
                _validate(resolved, console) if validate else _launch(resolved, folder, console)
            )
    except interrupts.Resumable as error:
        ending = Ending(fail(error, interrupts.INTERRUPTED), str(error))
    except ValueError as error:
        ending = Ending(fail(error, getattr(error, "exit_code", USAGE)), str(error))
    except KeyboardInterrupt:
        if json:
            print_json(Ending(interrupts.INTERRUPTED, interrupts.BEFORE_THE_RUN).to_dict())
        interrupts.leave()
    if json:
        print_json(ending.to_dict())
    sys.exit(ending.code)


def _check_usage(
    config: Path | None,
    out: Path | None,
    resume: Path | None,
    validate: bool,
    look: Path | None,
    overrides: bool,
) -> None:
    if resume and (config or out or validate or look):
        raise ValueError(
            "--resume takes its config and folder from the run: only --set goes with it"
        )
    if look and (config or out or validate or overrides):
        raise ValueError("--report and --status take no other option")


def _launch(config: Config, out: Path, console: Console) -> Ending:
    check_hub(config)  # before what takes long to import
    from search import launch

    _silence_transformers()
    return launch.launch(config, out, console)


def _resume(path: Path, overrides: list[str], console: Console) -> Ending:
    from search import launch

    _silence_transformers()
    return launch.resume(path, overrides, console)


def _validate(config: Config, console: Console) -> Ending:
    from search.outline import outline

    _silence_transformers()
    lines = outline(config)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print("valid")
    return Ending(DONE, "valid", more={"plan": lines})


def _rebuild_report(path: Path, console: Console) -> Ending:
    from search.finish import rebuild_report

    return rebuild_report(path, console)


def _show_status(path: Path, console: Console) -> Ending:
    from search.journal import RunFolder
    from search.screen import print_status

    folder = RunFolder.look(path)
    print_status(folder, console)
    return Ending(DONE, "shown", path, folder.read_json("status.json"))


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one progress is enough, ours


def _new_folder(config: Path | None) -> Path:
    name = config.stem if config else schema.DEFAULT.stem
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


app = application(command)


def main() -> None:
    """Console entry: runs the command, and says a mistake in its options in one line too."""
    sys.stdout = interrupts.Unbreakable(sys.stdout)
    sys.stderr = interrupts.Unbreakable(sys.stderr)
    with interrupts.stoppable():
        _run()


def _run() -> None:
    try:
        # It ends by sys.exit, but for --help; Typer takes an interrupt and returns this.
        if app(standalone_mode=False) == _INTERRUPTED_BY_TYPER:
            interrupts.leave()
    except typer.TyperException as error:
        sys.exit(fail(error.format_message(), USAGE))
    except (typer.Abort, KeyboardInterrupt):
        interrupts.leave()


if __name__ == "__main__":
    main()
