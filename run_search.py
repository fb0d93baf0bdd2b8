"""Search for a pruning metric: launch, resume, validate, rebuild a report."""

import sys
from contextlib import ExitStack

from search import interrupts

_signals = ExitStack()
if __name__ == "__main__":
    _signals.enter_context(interrupts.stoppable())  # before what takes long to import

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs import schema
from configs.files import shipped

USAGE, WRONG_FOLDER = 2, 4
_INTERRUPTED_BY_TYPER = 130


def command(
    config: Annotated[
        Path | None,
        typer.Option(
            help=f"YAML experiment, or {', '.join(shipped())}; none: the embedded default."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Empty folder of the run; none: a new one in runs/.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value, over the config; repeatable.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder, or extend a finished one.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Check all that can be checked without work.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and end.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Rebuild report.html of the run in this folder.")
    ] = None,
    status: Annotated[
        Path | None, typer.Option(help="Print where the run in this folder stands.")
    ] = None,
) -> None:
    """Evolve a symbolic pruning metric.

    Exit codes: 0 done; 2 usage or config; 3 interrupted, resumable; 4 the folder does not fit this
    request; 5 no evaluation succeeded.
    """
    if print_config:
        sys.exit(_print_config(config, overrides or [], out or resume or report or status))
    # Imported here, so that --help and usage errors answer at once.
    from transformers.utils import logging as transformers_logging

    from search import launch
    from search.experiment import resolve
    from search.journal import FolderError, RunFolder, WriteError
    from search.machine import memory_lines
    from search.pool.protocol import PoolError
    from search.screen import print_status

    transformers_logging.disable_progress_bar()  # one progress is enough, ours
    console = Console(highlight=False, markup=False)
    try:
        _check_usage(config, out, resume, validate, report or status, bool(overrides))
        if status:
            print_status(RunFolder.look(status), console)
            code = 0
        elif report:
            code = launch.rebuild_report(report, console)
        elif resume:
            code = launch.resume(resume, overrides or [], console)
        else:
            resolved = schema.load(config, overrides or [])
            if validate:
                experiment = resolve(resolved)
                code = _say_valid([*experiment.notes, *memory_lines(experiment)], console)
            else:
                code = launch.launch(resolved, out or _new_folder(config), console)
    except FolderError as error:
        code = _fail(error, WRONG_FOLDER)
    except (PoolError, WriteError) as error:
        code = _fail(error, interrupts.INTERRUPTED)
    except ValueError as error:
        code = _fail(error, USAGE)
    sys.exit(code)


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


def _print_config(config: Path | None, overrides: list[str], folder: Path | None) -> int:
    try:
        if folder:
            raise ValueError("--print-config goes with --config and --set alone")
        print(schema.to_yaml(schema.load(config, overrides)), end="")
    except ValueError as error:
        return _fail(error, USAGE)
    return 0


def _say_valid(notes: list[str], console: Console) -> int:
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print("valid")
    return 0


def _new_folder(config: Path | None) -> Path:
    name = config.stem if config else schema.DEFAULT.stem
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _fail(error: Exception | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(command)


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
        sys.exit(_fail(error.format_message(), USAGE))
    except (typer.Abort, KeyboardInterrupt):
        interrupts.leave()


if __name__ == "__main__":
    main()
