"""From a config to a finished run: check, load, evolve, finish. Resuming takes the same path.

From Python see docs/PYTHON.md.
"""

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from prunevolve.command_line import (
    BROKEN,
    INTERRUPTED,
    NOTHING_EVALUATED,
    Resumable,
    check_new_run,
)
from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.configs.schema import load as read_config
from prunevolve.pruning.json_file import JsonObject
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.progress import step
from prunevolve.search.evaluator import free_memory_as_usual
from prunevolve.search.evolution import Evolution, State
from prunevolve.search.experiment import Experiment, pinned_config, resolve
from prunevolve.search.pool import guard
from prunevolve.search.pool.cluster import connected
from prunevolve.search.pool.pool import CallError, Pool
from prunevolve.search.pool.worker import InProcess
from prunevolve.search.pool.workers import Backend
from prunevolve.search.prepare import check_identity, identity, prepare, settings, write_environment
from prunevolve.search.progress import OnRecord, Recorder, ignore
from prunevolve.search.records import Record
from prunevolve.search.results import finish, say_files, write_report
from prunevolve.search.run_folder import FolderError, RunFolder

__all__ = ["Found", "Record", "Result", "Unfinished", "evolve", "read_config", "resume"]

_LEAST_LAG, _GOOD_LAG = 4, 16
"""Lags for each worker: with less than the first they wait for one another; with the second 95%
work though one evaluation in ten takes ten times as long."""

_NOWHERE = Console(file=io.StringIO())  # or from Python it would mix with the caller's output


class Unfinished(RuntimeError):
    """A run stopped before its end, with this exit code; the message says why and how to go on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Found(Criterion):
    """A metric that a search found, with its comparison group, which `prune` takes."""

    name: str  # the candidate's index, and behind a dash how many factors were left out
    fitness: float


@dataclass(frozen=True)
class Result:
    """A finished search: its folder, from which it can be extended, and `summary.json`."""

    folder: Path
    summary: JsonObject
    is_new: bool = True  # not finished before

    @property
    def best(self) -> Criterion:
        """The winner on the selection text."""
        return Criterion.parse(self.summary["best"]["metric"], self.summary["best"]["group"])

    @property
    def front(self) -> tuple[Found, ...]:
        """The metrics that no smaller one equals or beats, by ascending size."""
        return tuple(
            Found(Metric.parse(row["metric"]), row["group"], row["name"], float(row["fitness"]))
            for row in RunFolder.look(self.folder).front()
        )


def evolve(
    config: Config, out: Path | str, on_record: OnRecord = ignore, console: Console = _NOWHERE
) -> Result:
    """Run a new search to its end.

    Args:
        config: As `read_config` returns it.
        out: The run's folder, which must be empty or not exist.
        on_record: Called with each candidate and its outcome once they are in the journal, in the
            order of breeding. If it raises, the run stops after a checkpoint; `resume` continues.
        console: Where to print progress and results.

    Raises:
        Unfinished: If the run stopped early: workers or disk failed, or nothing was evaluated.
        KeyboardInterrupt: If it was interrupted; as of `Unfinished`, the message says how to go on.
        FolderError: If the folder is not empty or cannot be created.
        ValueError: If something is wrong with the config.
    """
    path = Path(out)
    # Before the folder is created: an unavailable text or cluster must not leave a run behind.
    check_new_run(path)
    experiment = _ready(pinned_config(config), console)
    with backend_of(experiment, console) as backend, closing(RunFolder.create(path)) as folder:
        return _run(folder, experiment, backend, [], console, on_record)


def resume(
    folder: Path | str,
    overrides: Sequence[str] = (),
    on_record: OnRecord = ignore,
    console: Console = _NOWHERE,
) -> Result:
    """Continue a run to its end, or extend a finished one.

    Args:
        overrides: Such as `search.candidates=500`; those that would change the search are refused.
        on_record: As in `evolve`; called with new records only.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
        Unfinished: And anything else that `evolve` raises.
    """
    path = Path(folder)
    with closing(RunFolder.open_(path)) as run:
        config = schema.load(path / "config.yaml", overrides)  # refuses an unknown key
        check_identity(run, settings(config))  # before a text is read
        records, summary = run.records(), run.summary()
        done, candidates = len(records), config.search.candidates
        ended = done == candidates or _seconds(run) >= _limit(config)
        if summary and summary["candidates"] == done and ended:
            if not (path / "report.html").exists():  # killed before it was written
                write_report(run)
            console.print(f"{path} is finished; nothing to do")
            say_files(run, config, summary, console)
            return Result(path, summary, is_new=False)
        experiment = _ready(config, console)
        check_identity(run, identity(experiment))
        if candidates < done:
            rule = f"is below the {done} that {path} has: give more"
            raise FolderError(f"search.candidates = {candidates} {rule}")
        with backend_of(experiment, console) as backend:
            return _run(run, experiment, backend, records, console, on_record)


def _ready(config: Config, console: Console) -> Experiment:
    """Return the experiment with its texts, once all is checked that needs no worker."""
    experiment = resolve(config)
    with console.status("reading the texts"):  # no line, in case one is refused
        experiment = experiment.read_texts()
    for warning in experiment.warnings:
        console.print(f"warning: {warning}")
    return experiment


@contextmanager
def backend_of(experiment: Experiment, console: Console) -> Iterator[Backend]:
    """Open the backend that the config asks for, and close it at the end, whatever happens.

    Raises ValueError if no such cluster lets us in, Resumable if it is lost.
    """
    ray = experiment.config.ray
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        if ray.workers == 0:
            stack.callback(free_memory_as_usual)
            yield InProcess(experiment)
            return
        with step(console, f"connecting to Ray: {ray.address}"):
            head = stack.enter_context(connected(ray))
            # Not imported before: it imports Ray, which reads the environment then.
            from prunevolve.search.pool.on_ray import RayBackend

            backend = stack.enter_context(RayBackend.opened(head, experiment))
        # The workers need the cores: on several threads the driver would wait for its own.
        torch.set_num_threads(1)
        yield backend


@contextmanager
def _resumable(folder: RunFolder) -> Iterator[None]:
    """Let whatever ends the run early name the command that goes on."""
    way_on = f"continue with {folder.resume_command}"
    guard.tell(f"resume {way_on}")
    try:
        yield
    except KeyboardInterrupt as error:
        why = f"interrupted after {len(folder.outcomes())} candidates"
        raise KeyboardInterrupt(f"{why}; {way_on}") from error
    except Resumable as error:
        raise Unfinished(f"error: {error}; {way_on}", INTERRUPTED) from error
    except CallError as error:
        folder.write_failure("run", error.trace)
        trace = folder.path / "failures/run.txt"
        raise Unfinished(f"error: {error}; see {trace}", BROKEN) from error


def _run(
    folder: RunFolder,
    experiment: Experiment,
    backend: Backend,
    records: list[Record],
    console: Console,
    on_record: OnRecord,
) -> Result:
    """Evolve to the end and measure the winner; the records are emptied once they are replayed."""
    began = time.monotonic() - _seconds(folder)
    with _resumable(folder):
        write_environment(folder, experiment)
        config = schema.to_yaml(experiment.config)
        if not (folder.path / "config.yaml").exists():
            folder.write_text("config.yaml", config)
        console.print(f"run folder {folder.path}")
        measured, keep = folder.losses(), folder.keep_losses
        pool = Pool(backend, experiment, console, measured=measured, keep=keep)
        fingerprints = prepare(folder, experiment, pool, console)
        folder.write_text("config.yaml", config)  # nothing will be refused any more
        lag, workers = experiment.config.search.lag, pool.workers.ready + pool.workers.starting
        if workers > 1 and lag < _LEAST_LAG * workers:
            console.print(
                f"warning: search.lag = {lag} is small for {workers} workers, which will wait for "
                f"one another: set search.lag={_GOOD_LAG * workers} in a new run; see "
                "docs/CLUSTER.md"
            )
        start = _state_before(folder, records, lag, console)
        evolution = Evolution(experiment.breeder, fingerprints, start, records)
        recorder = Recorder(folder, experiment, evolution, pool, console, on_record, began)
        with recorder.opened():
            recorder.outcomes.update(record.outcome.kind for record in records)
            records.clear()  # frees the memory of what can be twenty thousand records
            _evolve(recorder)
        hours, committed = experiment.config.search.hours, evolution.state.committed
        if not evolution.done:
            console.print(f"search.hours = {hours:g} are over after {committed} candidates")
        if evolution.state.best is None:
            more = "candidates" if evolution.done else "hours"
            raise Unfinished(
                "error: no candidate was evaluated to the end; breed more: "
                f"{folder.resume_command} --set search.{more}=N",
                NOTHING_EVALUATED,
            )
        return Result(folder.path, finish(recorder))


def _state_before(
    folder: RunFolder, records: Sequence[Record], lag: int, console: Console
) -> State:
    """Return the state in the checkpoint, or the first one, and say why, if that does not fit."""
    try:
        if records:
            enough = records[: max(0, len(records) - lag)]  # to breed what is missing
            return State.from_checkpoint(folder.read_json("checkpoint.json"), enough)
    except ValueError as error:
        console.print(f"warning: checkpoint.json: {error}: all of the journal is replayed")
    return State()


def _limit(config: Config) -> float:
    """Return the seconds after which no candidate is bred any more."""
    return 3600 * (config.search.hours or math.inf)


def _seconds(folder: RunFolder) -> float:
    """Return the seconds that a run's processes took before."""
    with suppress(ValueError):  # no status was written
        return float(folder.read_json("status.json", "seconds")["seconds"])
    return 0.0


def _evolve(recorder: Recorder) -> None:
    """Run the loop to its end; each record is in the journal before the next is committed."""
    evolution, pool, limit = recorder.evolution, recorder.pool, _limit(recorder.experiment.config)
    while not evolution.done and (recorder.seconds < limit or evolution.waits):
        for candidate in evolution.ask() if recorder.seconds < limit else ():
            if candidate.decided:
                recorder.add(evolution.tell(candidate.index, candidate.decided))
            else:
                pool.submit(candidate)
            if recorder.seconds >= limit:
                break
        if not evolution.done and (job := pool.next_done()):
            recorder.note(job)
            recorder.add(evolution.tell(job.candidate.index, job.outcome))
        recorder.show()
