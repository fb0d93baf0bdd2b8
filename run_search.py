"""Search for a pruning metric: launch, resume, validate, rebuild a report."""

import sys

import command_line

if __name__ == "__main__":
    command_line.leave_on_signals()  # before what takes long to import

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

import interrupts
from configs import schema
from configs.files import shipped
from configs.schema import Config
from search.ending import Ending
from search.names import check_hub, check_names

EXAMPLES = (
    "prunevolve-search  (the embedded model, no download)",
    "prunevolve-search --config smollm2_135m --out runs/first",
    "prunevolve-search --set search.seed=1 --set pruning.sparsity=0.7",
    "prunevolve-search --config llama2_7b --validate",
    "prunevolve-search --resume runs/first --set search.candidates=5000",
)


def command(
    config: Annotated[
        Path | None,
        Option(
            help=f"YAML experiment, or {', '.join(shipped())}; none: the embedded default.",
            autocompletion=shipped,
        ),
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
    print_config: Annotated[
        bool, Option("--print-config", help="Print the resolved config and end.")
    ] = False,
    report: Annotated[
        Path | None, Option(help="Rebuild report.html of the run in this folder, even amid it.")
    ] = None,
    status: Annotated[
        Path | None, Option(help="Print where the run in this folder stands.")
    ] = None,
    as_json: Annotated[bool, command_line.json_option()] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> dict[str, Any]:
    """Evolve a symbolic pruning metric.

    Exit codes: 0 done; 2 usage or config; 3 interrupted, resumable; 4 the folder does not fit this
    request; 5 no evaluation succeeded.
    """
    console, words = Console(highlight=False, markup=False), overrides or []
    try:
        if print_config:
            return _print_config(config, words, out or resume or report or status).to_dict()
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
        return ending.to_dict()
    except interrupts.Resumable as error:
        return command_line.failed(command_line.INTERRUPTED, error)
    except ValueError as error:
        return command_line.failed(getattr(error, "exit_code", command_line.USAGE), error)
    except KeyboardInterrupt:
        command_line.leave()


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


def _print_config(config: Path | None, overrides: list[str], folder: Path | None) -> Ending:
    if folder:
        raise ValueError("--print-config goes with --config and --set alone")
    print(schema.to_yaml(schema.load(config, overrides)), end="")
    return Ending(command_line.DONE, "shown")


def _launch(config: Config, out: Path, console: Console) -> Ending:
    check_hub(config)  # before what takes long to import
    from search import launch

    _silence_transformers()
    with interrupts.stoppable():
        return launch.launch(config, out, console)


def _resume(path: Path, overrides: list[str], console: Console) -> Ending:
    from search import launch

    _silence_transformers()
    with interrupts.stoppable():
        return launch.resume(path, overrides, console)


def _validate(config: Config, console: Console) -> Ending:
    from search.outline import outline

    _silence_transformers()
    lines = outline(config)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print("valid")
    return Ending(command_line.DONE, "valid", more={"plan": lines})


def _rebuild_report(path: Path, console: Console) -> Ending:
    from search.finish import rebuild_report

    return rebuild_report(path, console)


def _show_status(path: Path, console: Console) -> Ending:
    from search.journal import RunFolder
    from search.screen import print_status

    folder = RunFolder.look(path)
    print_status(folder, console)
    return Ending(command_line.DONE, "shown", path, folder.read_json("status.json"))


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one progress is enough, ours


def _new_folder(config: Path | None) -> Path:
    name = config.stem if config else schema.DEFAULT.stem
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


app = command_line.make_app(command, EXAMPLES)


def main() -> None:
    """Console entry: runs the command; a reader of its output that goes away ends nothing."""
    sys.stdout = interrupts.Unbreakable(sys.stdout)
    sys.stderr = interrupts.Unbreakable(sys.stderr)
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
