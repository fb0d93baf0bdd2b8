"""The command `run_search.py`: launch, resume or validate a run, or rebuild its report."""

import sys
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated

from typer import Option

from prunevolve import command_line
from prunevolve.command_line import DONE, INTERRUPTED, Answer, outcome
from prunevolve.configs import schema
from prunevolve.configs.files import shipped
from prunevolve.configs.schema import Config
from prunevolve.evaluation.text import find
from prunevolve.pruning.baselines import find_metric
from prunevolve.pruning.model_name import hub_id
from prunevolve.pruning.progress import PlainConsole

EXAMPLES = (
    f"{command_line.SEARCH}  (the embedded model, no download)",
    f"{command_line.SEARCH} --config smollm2_135m --out runs/first",
    f"{command_line.SEARCH} --set search.seed=1 --set pruning.sparsity=0.7",
    f"{command_line.SEARCH} --config llama2_7b --validate",
    f"{command_line.SEARCH} --resume runs/first --set search.candidates=5000",
)

FILES = {  # of a run folder that `--json` names, if they exist
    "config": "config.yaml",
    "journal": "journal.jsonl",
    "best_metric": "best_metric.json",
    "summary": "summary.json",
    "report": "report.html",
    "chart": "fitness.svg",
}


def command(
    config: Annotated[
        Path | None, Option(help=f"YAML file, or {', '.join(shipped())}; default embedded.")
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
        Path | None, Option(help="Rebuild report.html and fitness.svg of the run in this folder.")
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
    # A mistake is refused before torch and transformers are imported, which takes seconds.
    if run := resume or report or status:
        command_line.check_run(run)
    if report or status:
        return _inspect(report, status)
    if resume:
        return _search(None, resume, overrides, validate)
    resolved = schema.load(config, overrides)
    _check_names(resolved)
    new = f"{(config or schema.DEFAULT).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder = out or Path("runs") / new
    if not validate:
        command_line.check_new_run(folder)
    return _search(resolved, folder, overrides, validate)


def _check_names(config: Config) -> None:
    """Refuse a model, text or metric that is not there."""
    for model in (*(task.model for task in config.tasks), *config.selection.model):
        hub_id(model)
    for role, texts in chain(*(task.texts.items() for task in config.tasks)):
        with schema.naming(role):
            for corpus, split in zip(texts.corpus, texts.split, strict=True):
                find(corpus, split)
    for seed in config.search.seeds:
        find_metric(seed)


def _search(config: Config | None, folder: Path, overrides: list[str], validate: bool) -> Answer:
    """Launch a run, continue one if there is no config, or print what would be done."""
    from prunevolve.pruning.parse import read_metric

    for seed in config.search.seeds if config else ():  # before transformers is imported
        read_metric(seed)

    from transformers.utils import logging

    from prunevolve.search import run
    from prunevolve.search.plan import plan_of
    from prunevolve.search.progress import status_of
    from prunevolve.search.run_folder import RunFolder

    logging.disable_progress_bar()  # the search shows its own progress
    console = PlainConsole()
    if config and validate:
        plan = plan_of(config)
        console.print(schema.to_yaml(config), *plan, "valid", sep="\n")
        return outcome(DONE, ending="valid", plan=plan, config=config.model_dump())
    try:
        if config:
            result = run.evolve(config, folder, console=console)
        else:
            result = run.resume(folder, overrides, console=console)
    except (run.Unfinished, KeyboardInterrupt) as end:
        if not str(end):  # interrupted before there is anything to go on with
            raise
        print(end, file=sys.stderr)
        status = status_of(RunFolder.look(folder)) if (folder / "status.json").is_file() else {}
        code = getattr(end, "code", INTERRUPTED)
        return outcome(code, error=str(end), **_about(folder), **status)
    ending = "finished" if result.is_new else "finished before"
    return outcome(DONE, ending=ending, **_about(folder), **result.summary)


def _inspect(report: Path | None, status: Path | None) -> Answer:
    """Rebuild the report of a run, or print how far it is."""
    from prunevolve.search.progress import print_status, status_of
    from prunevolve.search.run_folder import RunFolder

    if status:
        now = print_status(RunFolder.look(status), PlainConsole())
        return outcome(DONE, ending="shown", **_about(status), **now)
    from prunevolve.search.results import write_report

    assert report
    folder = RunFolder.look(report)
    is_finished = write_report(folder)
    note = "" if is_finished else ": partial, because the run has not ended"
    print(f"wrote {report / 'report.html'} and fitness.svg{note}")
    ending = "written" if is_finished else "written, partial"
    return outcome(DONE, ending=ending, **_about(report), **status_of(folder))


def _about(folder: Path) -> Answer:
    """Return the run's folder and its files."""
    files = {name: str(folder / file) for name, file in FILES.items() if (folder / file).is_file()}
    return {"folder": str(folder), "files": files}


app = command_line.make_app(command, EXAMPLES)
