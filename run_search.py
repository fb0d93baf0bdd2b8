"""Search for a pruning metric: launch, resume or validate a run, or rebuild its report."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from prunevolve import command_line, extras
from prunevolve.command_line import DONE, Answer, outcome
from prunevolve.configs import schema
from prunevolve.configs.files import shipped
from prunevolve.configs.schema import Config
from prunevolve.pruning.json_file import read_object
from prunevolve.pruning.progress import PlainConsole

EXAMPLES = (
    "python run_search.py  (the embedded model, no download)",
    "python run_search.py --config smollm2_135m --out runs/first",
    "python run_search.py --set search.seed=1 --set pruning.sparsity=0.7",
    "python run_search.py --config llama2_7b --validate",
    "python run_search.py --resume runs/first --set search.candidates=5000",
)

FILES = {
    "config": "config.yaml",
    "journal": "journal.jsonl",
    "best_metric": "best_metric.json",
    "summary": "summary.json",
    "report": "report.html",
    "chart": "fitness.svg",
}
"""Files of a run folder that `--json` names, if they exist."""

SHOWN = ("verdict", "dense", "baselines", "best", "candidates", "outcomes", "perplexity_of")
"""Keys that `--json` repeats from a run's summary, or from its status if it is not finished."""


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
        Path | None,
        Option(help="Rebuild report.html and fitness.svg of the run in this folder."),
    ] = None,
    status: Annotated[
        Path | None, Option(help="Print the progress of the run in this folder.")
    ] = None,
    as_json: Annotated[bool, command_line.JSON_OPTION] = False,
    version: Annotated[bool, command_line.version_option()] = False,
) -> Answer:
    """Evolve a symbolic pruning metric."""
    console = PlainConsole()
    overrides = overrides or []
    inspected = report or status
    if print_config:
        if out or resume or inspected:
            raise ValueError("--print-config goes only with --config and --set")
        print(schema.to_yaml(schema.load(config, overrides)), end="")
        return outcome(DONE, ending="shown")
    if resume and (config or out or validate or inspected):
        raise ValueError(
            "--resume takes its config and folder from the run: only --set goes with it"
        )
    if inspected and (config or out or validate or overrides):
        raise ValueError("--report and --status take no other option")
    if status:
        return _show_status(status, console)
    extras.require("search", *extras.SEARCH)
    if report:
        return _rebuild_report(report, console)
    if resume:
        return _resume(resume, overrides, console)
    resolved = schema.load(config, overrides)
    if validate:
        return _validate(resolved, console)
    return _launch(resolved, out or _new_folder(config), console)


def _launch(config: Config, out: Path, console: Console) -> Answer:
    from prunevolve.search import launch

    return _to_the_end(out, lambda: launch.run(config, out, console), console)


def _resume(path: Path, overrides: list[str], console: Console) -> Answer:
    from prunevolve.search import launch

    return _to_the_end(path, lambda: launch.run_on(path, overrides, console), console)


def _to_the_end(folder: Path, work: Callable[[], str], console: Console) -> Answer:
    """Do a run's work, and print why it stopped if it did not end."""
    from prunevolve.search.launch import Unfinished

    _silence_transformers()
    try:
        return outcome(DONE, ending=work(), **_about(folder))
    except Unfinished as end:
        console.print(str(end), soft_wrap=True)
        return outcome(end.code, error=str(end), **_about(folder))


def _validate(config: Config, console: Console) -> Answer:
    from prunevolve.search.experiment import plan_of

    _silence_transformers()
    lines = plan_of(config)
    for line in lines:
        console.print(line, soft_wrap=True)
    console.print("valid")
    return outcome(DONE, ending="valid", plan=lines)


def _rebuild_report(path: Path, console: Console) -> Answer:
    from prunevolve.search.results import write_report
    from prunevolve.search.run_folder import RunFolder

    is_finished = write_report(RunFolder.look(path))
    note = "" if is_finished else ": partial, because the run has not ended"
    console.print(f"wrote {path / 'report.html'} and fitness.svg{note}", soft_wrap=True)
    return outcome(DONE, ending="written" if is_finished else "written, partial", **_about(path))


def _show_status(path: Path, console: Console) -> Answer:
    from prunevolve.search.run_folder import RunFolder
    from prunevolve.search.status import print_status

    folder = RunFolder.look(path)
    print_status(folder, console)
    return outcome(DONE, ending="shown", **_about(path) | folder.read_json("status.json"))


def _about(folder: Path) -> Answer:
    """Return the run's folder, its files and its results so far; nothing if there is no folder."""
    if not folder.is_dir():
        return {}
    files = {name: str(folder / file) for name, file in FILES.items() if (folder / file).is_file()}
    summary, status = (
        read_object(folder / name) if (folder / name).is_file() else {}
        for name in ("summary.json", "status.json")
    )
    # If the run was extended since, the summary does not cover all its candidates.
    results = summary if summary.get("candidates") == status.get("candidates") else status
    shown = {key: results[key] for key in SHOWN if key in results}
    return {"folder": str(folder), "files": files, **shown}


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
        DONE: "done",
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
