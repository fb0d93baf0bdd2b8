"""The end of a search: its winner, measured on the report text, as files and on the screen.

`finish` writes what came of it as one object, `summary.json`, which the screen, the report and the
verdict read.
"""

import shlex
import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.table import Column
from rich.table import Table as ScreenTable

from prunevolve.command_line import PRUNE, SEARCH
from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.progress import step
from prunevolve.search.evaluator import perplexity_of
from prunevolve.search.experiment import Experiment
from prunevolve.search.finalists import Finalist, choose
from prunevolve.search.pool.pool import Pool
from prunevolve.search.population import State
from prunevolve.search.progress import FINISHED
from prunevolve.search.records import Candidate, Losses, Outcome, Record, Wanted
from prunevolve.search.report import report
from prunevolve.search.run_folder import FolderError, RunFolder
from prunevolve.search.scale import baselines_on, cells_of, paired_difference, wanted_of
from prunevolve.search.verdict import convergence, looks_at_report, verdict_of


def finish(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    state: State,
    started: float,
    console: Console,
) -> None:
    """Choose and measure the winner; write and print the results.

    Args:
        state: The state after the whole journal; it has at least one evaluated candidate.
        started: When the run began, by `time.monotonic`, if all its processes had followed one
            another.
    """
    choice = choose(experiment, pool, state.finalists(), winner_of(folder), console)
    winner, standings = choice.winner, choice.standings
    folder.write_best(winner.record, experiment.origin(candidate=winner.name, selection=standings))
    folder.write_hall_of_fame(standings, state.hall_of_fame)
    places = range(len(experiment.tasks))
    wanted = [(place, "report", winner.record.criterion) for place in places]
    known = pool.losses("report", [*wanted_of("report", places), *wanted])
    tasks = [_measured(experiment, known, place, winner.record) for place in places]
    told = folder.told()
    outcomes, looks = Counter(kind for kind, _ in told), _looks_before(folder, len(told))
    seconds = round(time.monotonic() - started, 1)
    first, pruning = tasks[0], experiment.config.pruning.model_dump()
    summary: JsonObject = {
        "verdict": verdict_of(tasks).sentence + looks_at_report(looks),
        "convergence": convergence([fitness for _, fitness in told]),
        "looks": looks,
        "best": first["best"] | winner.described,
        "candidates": outcomes.total(),
        "outcomes": dict(outcomes),
        "pruning": pruning | {key: first[key] for key in ("sparsity", "pattern")},
        "tasks": tasks,
        "selection": standings,
        "path": choice.path,
        "seconds": seconds,
        # The first task's results also stand here.
        **{key: first[key] for key in ("dense", "baselines", "behind_best", "perplexity_of")},
    }
    folder.write_json("summary.json", summary)
    with step(console, "drawing the report"):
        write_report(folder)
    for table in report.measured_tables(summary):
        console.print(table.about, _on_screen(table), sep="\n")
    best = winner.record.criterion
    console.print(f"{report.FOUND}: {best.metric.infix}", f"its text: {best.text}", sep="\n")
    console.print(report.about_winner(summary["best"], state.hall_of_fame))
    console.print(f"verdict: {summary['verdict']}", f"search: {summary['convergence']}", sep="\n")
    say_files(folder, experiment.config, console)
    ended = {"state": FINISHED, "seconds": seconds}
    folder.write_json("status.json", folder.read_json("status.json") | ended)


def winner_of(folder: RunFolder) -> Finalist | None:
    """Return the winner of a run that ended and was extended since; None if it never ended."""
    if not folder.has_ended:
        return None
    best = read_summary(folder)["best"]
    name, criterion = str(best["name"]), Criterion.parse(best["metric"], best["group"])
    candidate = Candidate(int(name.partition("-")[0]), criterion)
    return Finalist(name, Record(candidate, Outcome("evaluated", best["fitness"])))


def _looks_before(folder: RunFolder, candidates: int) -> list[JsonObject]:
    """Return the looks at the report text after fewer candidates, the first one first."""
    if not folder.has_ended:
        return []
    before = read_summary(folder)
    looks: list[JsonObject] = before.get("looks", [])
    if before["candidates"] == candidates:
        return looks
    perplexity = before["best"]["perplexity"]
    return [*looks, {"candidates": before["candidates"], "perplexity": perplexity}]


def _measured(
    experiment: Experiment, known: Mapping[Wanted, Losses], index: int, winner: Record
) -> JsonObject:
    """Return a task's perplexities on its report text: of dense, baselines and winner.

    `behind_best` is how far a baseline is behind the winner, window by window, in nats per token.
    What a winner lacks that cannot prune the model is null.
    """
    dense, named = known[index, "report", None] or [], baselines_on(index, "report", known)
    best = known[index, "report", winner.criterion]
    subject, row = experiment.subject_of[index], experiment.task_rows()[index]
    provenance = experiment.subjects[subject].windows["report"].provenance
    return {
        **row,
        "dense": perplexity_of(dense),
        "baselines": {name: perplexity_of(losses) for name, losses in named.items()},
        "best": {"perplexity": best and perplexity_of(best)},
        "behind_best": {
            name: paired_difference(losses, best).as_json("nats")
            if best
            else {"nats": None, "standard_error": None}
            for name, losses in named.items()
        },
        "by_text": [
            {
                "text": cell.text,
                "dense": perplexity_of(cell.dense),
                "named": cell.baseline,
                "named_perplexity": perplexity_of([named[cell.baseline][i] for i in cell.windows]),
                "perplexity": best and perplexity_of([best[i] for i in cell.windows]),
                "relative_rise": cell.value(best or []),
            }
            for cell in cells_of(experiment, index, "report", known)
        ],
        "perplexity_of": {**provenance, "dtype": experiment.subjects[subject].dtype},
    }


def _on_screen(table: report.Table) -> ScreenTable:
    """Return a table for the screen, without formulas, which are too wide."""
    shown = ScreenTable(*(Column(x, overflow="fold") for x in table.columns[: table.plain]))
    for row in table.rows:
        shown.add_row(*row[: table.plain])
    return shown


def say_files(folder: RunFolder, config: Config, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply it or to search on."""
    apply, search_on = commands_of(folder, config)
    way_on = f"it did not clearly win: search on with {search_on}"
    if verdict_of(read_summary(folder)["tasks"]).kind == "better":
        way_on = f"apply it: {apply}"
    report_page, metric = folder.path / "report.html", folder.path / "best_metric.json"
    console.print(f"report: {report_page}", f"metric: {metric}", way_on, sep="\n")


def commands_of(folder: RunFolder, config: Config) -> tuple[str, str]:
    """Return how to apply the best metric to the first task's model, as the run did, and how to
    search on.
    """
    words = [
        _word(name.replace("_", "-"), value)
        for name, values in _options_of(folder, config).items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    more = f"search.candidates={2 * config.search.candidates}"
    search_on = f"{SEARCH} --resume {shlex.quote(str(folder.path))} --set {more}"
    return " ".join([PRUNE, *words]), search_on


def _options_of(folder: RunFolder, config: Config) -> JsonObject:
    task = config.tasks[0]
    calibration, report_text = task.calibration, task.report
    is_unstructured = task.pattern == "unstructured"
    return {
        "model": task.model,
        "metric": str(folder.path / "best_metric.json"),
        "sparsity": task.sparsity if is_unstructured else None,
        "pattern": None if is_unstructured else task.pattern,
        "corpus": calibration.corpus,
        "split": calibration.split,
        "share": calibration.share,
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "bos": calibration.bos,
        "eval_corpus": report_text.corpus,
        "eval_split": report_text.split,
        "eval_windows": report_text.windows or "all",
        "dtype": task.dtype,
        "out": "DIR",
    }


def _word(name: str, value: object) -> str:
    """Return an option with its value, or a flag."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def read_summary(folder: RunFolder) -> JsonObject:
    """Return `summary.json`; raise FolderError if it is missing or damaged."""
    return folder.read_json("summary.json", "best", "tasks", "selection", "path")


def write_report(folder: RunFolder) -> bool:
    """Write `report.html` and its chart, `fitness.svg`, from the run folder's other files.

    Another process may go on working there: only whole lines of its journal are read.

    Returns:
        Whether the run is finished.

    Raises:
        FolderError: If nothing is evaluated yet, or a file is damaged.
    """
    # Imported here, so that a search does not load matplotlib when it starts.
    from prunevolve.search.report.charts import WIDE, fitness_chart, path_chart

    records = folder.records()
    if all(record.fitness is None for record in records):
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; "
            f"see {SEARCH} --status {folder.path}"
        )
    config = schema.load(folder.path / "config.yaml", [])
    size = config.search.population
    summary = read_summary(folder) if folder.has_ended else None
    charts = (
        fitness_chart(records, size),
        fitness_chart(records, size, WIDE),
        path_chart(summary["path"]) if summary and summary["path"] else "",
    )
    status: JsonObject = folder.read_json("status.json")
    page = report.render(
        config=config,
        records=records,
        summary=summary,
        environment=folder.read_json("environment.json"),
        ended=str(status["written"]),
        commands=commands_of(folder, config),
        charts=charts,
        baselines=status.get("baselines", {}),
    )
    folder.write_text("fitness.svg", charts[0])
    folder.write_text("report.html", page)
    return folder.is_finished(len(records))
