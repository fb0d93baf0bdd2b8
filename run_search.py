"""Search for a pruning metric: launch, resume or validate a run, or rebuild its report."""

import sys

import command_line

if __name__ == "__main__":
    command_line.leave_on_signals()  # before the slow imports

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
            help=f"YAML file, or {', '.join(shipped())}; default embedded.",
            autocompletion=shipped,
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(help="Empty folder for the run; default a new one in runs/.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Override a config key; can be repeated."),
    ] = None,
    resume: Annotated[
        Path | None, Option(help="Continue the run in this folder, or extend a finished one.")
    ] = None,
    validate: Annotated[
        bool, Option("--validate", help="Check the config and print the plan; run nothing.")
    ] = False,
    print_config: Annotated[
        bool, Option("--print-config", help="Print the resolved config and exit.")
    ] = False,
    report: Annotated[
        Path | None, Option(help="Rebuild report.html of the run in this folder, finished or not.")
    ] = None,
    status: Annotated[
        Path | None, Option(help="Print the progress of the run in this folder.")
    ] = None,
    as_json: Annotated[bool, command_line.json_option()] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> dict[str, Any]:
    """Evolve a symbolic pruning metric."""
    console, overrides = Console(highlight=False, markup=False), overrides or []
    try:
        if print_config:
            return _print_config(config, overrides, out or resume or report or status).to_dict()
        _check_usage(config, out, resume, validate, report or status, bool(overrides))
        if status:
            ending = _show_status(status, console)
        elif report:
            ending = _rebuild_report(report, console)
        elif resume:
            ending = _resume(resume, overrides, console)
        else:
            # A mistake in a config is reported before the slow imports.
            resolved = schema.load(config, overrides)
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
    inspected: Path | None,
    overrides: bool,
) -> None:
    if resume and (config or out or validate or inspected):
        raise ValueError(
            "--resume takes its config and folder from the run: only --set goes with it"
        )
    if inspected and (config or out or validate or overrides):
        raise ValueError("--report and --status take no other option")


def _print_config(config: Path | None, overrides: list[str], folder: Path | None) -> Ending:
    if folder:
        raise ValueError("--print-config goes only with --config and --set")
    print(schema.to_yaml(schema.load(config, overrides)), end="")
    return Ending(command_line.DONE, "shown")


def _launch(config: Config, out: Path, console: Console) -> Ending:
    check_hub(config)  # before the slow imports
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

    logging.disable_progress_bar()  # the search shows its own progress


def _new_folder(config: Path | None) -> Path:
    name = config.stem if config else schema.DEFAULT.stem
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


app = command_line.make_app(
    command,
    EXAMPLES,
    {
        command_line.DONE: "done",
        command_line.USAGE: "usage or config",
        command_line.INTERRUPTED: "interrupted, resumable",
        command_line.WRONG_FOLDER: "the folder does not fit this request",
        command_line.NOTHING_EVALUATED: "no evaluation succeeded",
    },
)


def main() -> None:
    """Console entry: runs the command, and keeps running if its output is closed."""
    sys.stdout = interrupts.Unbreakable(sys.stdout)
    sys.stderr = interrupts.Unbreakable(sys.stderr)
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
