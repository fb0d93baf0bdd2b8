"""Search for a pruning metric: launch, resume or validate a run, or rebuild its report."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from typer import Option

from prunevolve import command_line
from prunevolve.command_line import DONE, Answer, outcome
from prunevolve.configs import schema
from prunevolve.configs.files import shipped
from prunevolve.pruning.json_file import JsonObject, read_object
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
        bool,
        Option(
            "--validate", metavar="", help="Print the resolved config and the plan; run nothing."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        Option(help="Rebuild report.html and fitness.svg of the run in this folder."),
    ] = None,
    status: Annotated[
        Path | None, Option(help="Print the progress of the run in this folder.")
    ] = None,
    as_json: Annotated[bool, command_line.JSON_OPTION] = False,
    version: Annotated[bool, command_line.VERSION_OPTION] = False,
) -> Answer:
    """Evolve a symbolic pruning metric."""
    overrides = overrides or []
    if resume and (config or out or validate or report or status):
        raise ValueError(
            "--resume takes its config and folder from the run: only --set goes with it"
        )
    if (report or status) and (config or out or validate or overrides):
        raise ValueError("--report and --status take no other option")
    command_line.require("search", *command_line.SEARCH)
    if inspected := report or status:
        return _inspect(inspected, PlainConsole(), bool(report))
    # Before torch and transformers are imported, which takes seconds.
    resolved = None if resume else schema.load(config, overrides)
    from transformers.utils import logging

    from prunevolve.search import launch
    from prunevolve.search.experiment import plan_of

    logging.disable_progress_bar()  # the search shows its own progress
    console = PlainConsole()
    folder = resume or out or _new_folder(config)
    try:
        if resolved is None:
            ending = launch.run_on(folder, overrides, console)
        elif validate:
            lines = plan_of(resolved)
            console.print(schema.to_yaml(resolved), *lines, "valid", sep="\n")
            return outcome(DONE, ending="valid", plan=lines, config=resolved.model_dump())
        else:
            ending = launch.run(resolved, folder, console)
    except launch.Unfinished as end:
        console.print(str(end))
        return outcome(end.code, error=str(end), **_about(folder))
    return outcome(DONE, ending=ending, **_about(folder))


def _inspect(folder: Path, console: PlainConsole, rebuild: bool) -> Answer:
    """Print how far a run is, or rebuild its report."""
    from prunevolve.search.journal import RunFolder
    from prunevolve.search.progress import print_status
    from prunevolve.search.results import write_report

    ending = "shown"
    if not rebuild:
        print_status(RunFolder.look(folder), console)
    else:
        is_finished = write_report(RunFolder.look(folder))
        ending = "written" if is_finished else "written, partial"
        note = "" if is_finished else ": partial, because the run has not ended"
        console.print(f"wrote {folder / 'report.html'} and fitness.svg{note}")
    return outcome(DONE, ending=ending, **_about(folder))


def _about(folder: Path) -> Answer:
    """Return the run's folder, its files, and its summary, or its status if it has not ended."""
    files = {name: str(folder / file) for name, file in FILES.items() if (folder / file).is_file()}
    summary, status = (_read(folder / name) for name in ("summary.json", "status.json"))
    # If the run was extended since, the summary does not cover all its candidates.
    is_whole = summary.get("candidates") == status.get("candidates")
    return {"folder": str(folder), "files": files, **(summary if is_whole else status)}


def _read(path: Path) -> JsonObject:
    return read_object(path) if path.is_file() else {}


def _new_folder(config: Path | None) -> Path:
    name = config.stem if config else schema.DEFAULT.stem
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


app = command_line.make_app(command, EXAMPLES)


def main() -> None:
    """Console entry."""
    command_line.run_to_end(app)


if __name__ == "__main__":
    main()
