"""Search for a pruning metric: launch, resume or validate a run, or rebuild its report."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

import command_line
from configs import schema
from configs.files import shipped
from configs.schema import Config
from search.answer import about_run

EXAMPLES = (
    "python run_search.py  (the embedded model, no download)",
    "python run_search.py --config smollm2_135m --out runs/first",
    "python run_search.py --set search.seed=1 --set pruning.sparsity=0.7",
    "python run_search.py --config llama2_7b --validate",
    "python run_search.py --resume runs/first --set search.candidates=5000",
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
    as_json: Annotated[bool, command_line.JSON_OPTION] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> dict[str, Any]:
    """Evolve a symbolic pruning metric."""
    console = command_line.InterruptibleConsole(highlight=False, markup=False)
    overrides = overrides or []
    if print_config:
        return _print_config(config, overrides, out or resume or report or status)
    _check_usage(config, out, resume, validate, report or status, bool(overrides))
    if status:
        return _show_status(status, console)
    if report:
        return _rebuild_report(report, console)
    if resume:
        return _resume(resume, overrides, console)
    resolved = schema.load(config, overrides)
    if validate:
        return _validate(resolved, console)
    return _launch(resolved, out or _new_folder(config), console)


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


def _print_config(config: Path | None, overrides: list[str], folder: Path | None) -> dict[str, Any]:
    if folder:
        raise ValueError("--print-config goes only with --config and --set")
    print(schema.to_yaml(schema.load(config, overrides)), end="")
    return command_line.outcome(command_line.DONE, ending="shown")


def _launch(config: Config, out: Path, console: Console) -> dict[str, Any]:
    from search import launch

    _silence_transformers()
    return launch.launch(config, out, console)


def _resume(path: Path, overrides: list[str], console: Console) -> dict[str, Any]:
    from search import launch

    _silence_transformers()
    return launch.resume(path, overrides, console)


def _validate(config: Config, console: Console) -> dict[str, Any]:
    from search.plan import plan_of

    _silence_transformers()
    lines = plan_of(config)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print("valid")
    return command_line.outcome(command_line.DONE, ending="valid", plan=lines)


def _rebuild_report(path: Path, console: Console) -> dict[str, Any]:
    from search.journal import RunFolder
    from search.results import write_report

    is_finished = write_report(RunFolder.look(path))
    note = "" if is_finished else ": partial, because the run has not ended"
    console.print(f"wrote {path / 'report.html'}{note}", soft_wrap=True)
    ending = "written" if is_finished else "written, partial"
    return command_line.outcome(command_line.DONE, ending=ending, **about_run(path))


def _show_status(path: Path, console: Console) -> dict[str, Any]:
    from search.journal import RunFolder
    from search.screen import print_status

    folder = RunFolder.look(path)
    print_status(folder, console)
    fields = about_run(path) | folder.read_json("status.json")
    return command_line.outcome(command_line.DONE, ending="shown", **fields)


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
    """Console entry."""
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
