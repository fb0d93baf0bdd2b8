"""The end of a search: its winner, measured on the report text, as files and on the screen."""

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Column
from rich.table import Table as ScreenTable

from prunevolve.command_line import PRUNE, SEARCH
from prunevolve.configs import schema
from prunevolve.configs.schema import Config, Search
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.progress import step
from prunevolve.search import report
from prunevolve.search.evaluator import perplexity_of
from prunevolve.search.experiment import Experiment
from prunevolve.search.finalists import Finalist, choose
from prunevolve.search.progress import FINISHED, Recorder, convergence
from prunevolve.search.records import Candidate, Outcome, Record
from prunevolve.search.run_folder import FolderError, RunFolder
from prunevolve.search.scale import Measured, baselines_on, cells_of, paired_difference, wanted_of

CLEAR = 2.0  # standard errors above which a difference counts as clear
_KINDS = ("unknown", "worse", "level", "better")  # from the worst to the best


def finish(recorder: Recorder) -> JsonObject:
    """Choose and measure the winner of a search, in which at least one candidate was evaluated;
    write and print the results, and return the summary.
    """
    folder, experiment, pool = recorder.folder, recorder.experiment, recorder.pool
    state, console, before = recorder.evolution.state, recorder.console, recorder.folder.summary()
    winner_before = _winner_of(before) if before else None
    choice = choose(experiment, pool, state.finalists(), winner_before, console)
    winner = choice.winner
    folder.write_best(winner.record, experiment.origin(candidate=winner.name))
    folder.write_hall_of_fame(choice.standings, state.hall_of_fame)
    every_task = range(len(experiment.tasks))
    wanted = [(task, "report", winner.record.criterion) for task in every_task]
    losses = pool.losses("report", [*wanted_of(experiment, "report", every_task), *wanted])
    tasks = [_measured(experiment, losses, task, winner.record) for task in every_task]
    outcomes = folder.outcomes()
    looks = _looks(before, len(outcomes)) if before else []
    verdict, first = verdict_of(tasks), tasks[0]
    pruning = experiment.config.pruning.model_dump()
    summary: JsonObject = {
        "verdict": verdict.sentence + looks_at_report(looks),
        "verdict_kind": verdict.kind,
        "convergence": convergence([fitness for _, fitness in outcomes]),
        "looks": looks,
        "best": first["best"] | winner.described,
        "candidates": len(outcomes),
        "outcomes": dict(Counter(kind for kind, _ in outcomes)),
        "pruning": pruning | {key: first[key] for key in ("sparsity", "pattern")},
        "tasks": tasks,
        "selection": choice.standings,
        "path": choice.path,
        "seconds": round(recorder.seconds, 1),
        # The first task's results also stand here.
        **{key: first[key] for key in ("dense", "baselines", "behind_best", "perplexity_of")},
    }
    folder.write_json("summary.json", summary)
    folder.write_json("status.json", recorder.status(FINISHED))
    with step(console, "drawing the report"):
        write_report(folder)
    for table in report.measured_tables(summary):
        # Without formulas, which are too wide.
        on_screen = ScreenTable(*(Column(x, overflow="fold") for x in table.columns[: table.plain]))
        for row in table.rows:
            on_screen.add_row(*row[: table.plain])
        console.print(table.about, on_screen, sep="\n")
    best = winner.record.criterion
    console.print(f"{report.FOUND}: {best.metric.infix}", f"its text: {best.text}", sep="\n")
    console.print(report.about_winner(summary["best"], state.hall_of_fame))
    console.print(f"verdict: {summary['verdict']}", f"search: {summary['convergence']}", sep="\n")
    say_files(folder, experiment.config, summary, console)
    return summary


def _winner_of(summary: JsonObject) -> Finalist:
    """Return the winner of a run that ended and was extended since."""
    best = summary["best"]
    name, criterion = str(best["name"]), Criterion.parse(best["metric"], best["group"])
    candidate = Candidate(int(name.partition("-")[0]), criterion)
    return Finalist(name, Record(candidate, Outcome("evaluated", best["fitness"])))


def _looks(before: JsonObject, candidates: int) -> list[JsonObject]:
    """Return the looks at the report text after fewer candidates, the first one first."""
    looks: list[JsonObject] = before.get("looks", [])
    if before["candidates"] == candidates:
        return looks
    perplexity = before["best"]["perplexity"]
    return [*looks, {"candidates": before["candidates"], "perplexity": perplexity}]


def _measured(experiment: Experiment, measured: Measured, index: int, winner: Record) -> JsonObject:
    """Return a task's perplexities on its report text: of dense, baselines and winner.

    `behind_best` is how far a baseline is behind the winner, window by window, in nats per token.
    What a winner lacks that cannot prune the model is null.
    """
    dense = measured[index, "report", None] or []
    named = baselines_on(experiment, index, "report", measured)
    best = measured[index, "report", winner.criterion]
    subject = experiment.subjects[experiment.subject_of[index]]
    task: JsonObject = {
        **experiment.task_rows()[index],
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
            for cell in cells_of(experiment, index, "report", measured)
        ],
        "perplexity_of": {**subject.windows["report"].provenance, "dtype": subject.dtype},
    }
    return task | {"verdict": verdict_of([task]).sentence}


def say_files(folder: RunFolder, config: Config, summary: JsonObject, console: Console) -> None:
    """Print where a finished run's report and metric are, and how to apply it or to search on."""
    apply, search_on = commands_of(folder, config)
    is_better = summary["verdict_kind"] == "better"
    console.print(
        f"report: {folder.path / 'report.html'}",
        f"metric: {folder.path / 'best_metric.json'}",
        f"apply it: {apply}"
        if is_better
        else f"it did not clearly win: search on with {search_on}",
        sep="\n",
    )


def commands_of(folder: RunFolder, config: Config) -> tuple[str, str]:
    """Return how to apply a run's best metric to the first task's model, as the run did, and how
    to search on.
    """
    task = config.tasks[0]
    calibration, report_text = task.calibration, task.report
    is_unstructured = task.pattern == "unstructured"
    options: dict[str, object] = {
        "model": task.model,
        "metric": folder.path / "best_metric.json",
        "sparsity": task.sparsity if is_unstructured else None,
        "pattern": None if is_unstructured else task.pattern,
        "corpus": calibration.corpus,
        "split": calibration.split,
        "share": calibration.share,
        "samples": calibration.windows,
        "seqlen": calibration.length,
        "seed": calibration.seed,
        "bos" if calibration.bos else "no-bos": None if calibration.bos is None else "",
        "eval-corpus": report_text.corpus,
        "eval-split": report_text.split,
        "eval-windows": report_text.windows or "all",
        "dtype": task.dtype,
        "out": "DIR",
    }
    words = [
        f"--{name} {shlex.quote(str(value))}" if value != "" else f"--{name}"
        for name, values in options.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    search = config.search
    more = f" --set search.candidates={max(2 * search.candidates, Search().candidates)}"
    more += f" --set search.hours={2 * search.hours:g}" if search.hours else ""
    return " ".join([PRUNE, *words]), folder.resume_command + more


def write_report(folder: RunFolder) -> bool:
    """Write `report.html` and its chart, `fitness.svg`, from the run folder's other files; return
    whether the run is finished.

    Another process may go on working there: only whole lines of its journal are read.
    """
    records, summary = folder.records(), folder.summary()
    if all(record.fitness is None for record in records):
        raise FolderError(
            f"{folder.path} has no evaluated candidate yet: there is nothing to report; "
            f"see {SEARCH} --status {folder.path}"
        )
    config = schema.load(folder.path / "config.yaml", [])
    size = config.search.population
    charts = (
        report.fitness_chart(records, size),
        report.fitness_chart(records, size, report.WIDE),
        report.path_chart(summary["path"]) if summary and summary["path"] else "",
    )
    status, environment = folder.read_json("status.json"), folder.read_json("environment.json")
    commands = commands_of(folder, config)
    page = report.render(config, records, summary, status, environment, commands, charts)
    folder.write_text("fitness.svg", charts[0])
    folder.write_text("report.html", page)
    return summary is not None and summary["candidates"] == len(records)


class Verdict(NamedTuple):
    """How the metric that a run found does on the report text, compared with the best baseline."""

    kind: str  # better or worse by at least `CLEAR` errors, or level; unknown without an error
    sentence: str


def verdict_of(tasks: Sequence[JsonObject]) -> Verdict:
    """Return the verdict over tasks as `summary.json` has them: that on the worst of them."""
    verdicts = [_on_task(task) for task in tasks]
    if len(verdicts) == 1:
        return verdicts[0]
    parts = []
    for kind in reversed(_KINDS):
        names = [task["name"] for task, v in zip(tasks, verdicts, strict=True) if v.kind == kind]
        if names:
            parts.append(f"{kind} on {len(names)} of {len(tasks)} tasks ({', '.join(names)})")
    against = f"{report.best_of_the_baselines(tasks)} on the report text"
    sentence = f"Compared with {against}: {', '.join(parts)}."
    if unable := [task["name"] for task in tasks if task["best"]["perplexity"] is None]:
        sentence += f" It cannot prune {', '.join(unable)}."
    return Verdict(min((v.kind for v in verdicts), key=_KINDS.index), sentence)


def _on_task(task: JsonObject) -> Verdict:
    name = min(task["baselines"], key=task["baselines"].__getitem__)
    perplexity, baseline = task["best"]["perplexity"], task["baselines"][name]
    nats, error = task["behind_best"][name]["nats"], task["behind_best"][name]["standard_error"]
    against = f"{name}, {report.best_of_the_baselines([task])} on the report text"
    if perplexity is None:
        can = f"{against}, can: perplexity {baseline:.2f}"
        return Verdict("worse", f"Cannot prune the model, which {can}.")
    values = f"perplexity {perplexity:.2f} against {baseline:.2f}"
    change = abs(1 - perplexity / baseline)
    if error is None:
        why = "on a single window, so the error is unknown"
        return Verdict("unknown", f"Compared with {against}: {values}, {why}.")
    errors = abs(nats) / max(error, 1e-12)  # 0 of 0 for a baseline that was found again
    apart = f"{errors:.1f} standard errors apart"
    if errors < CLEAR:
        level = f"Does not clearly beat {against}, nor lose to it: {values}, {apart}."
        return Verdict("level", level)
    if nats > 0:
        return Verdict("better", f"Beats {against}: {values}, {change:.1%} lower, {apart}.")
    return Verdict("worse", f"Does not beat {against}: {values}, {change:.1%} higher, {apart}.")


def looks_at_report(looks: Sequence[JsonObject]) -> str:
    """Say that the report text was looked at before, after which a result on it flatters."""
    if not looks:
        return ""
    before = ", ".join(
        f"after {look['candidates']} candidates it had {report.shown(look['perplexity'])}"
        for look in looks
    )
    return f" Look {len(looks) + 1} at this text: {before}."
