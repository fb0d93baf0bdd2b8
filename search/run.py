"""From a config to a finished run: check, load, evolve, finish. Resuming takes the same path."""

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from prunevolve.command_line import BROKEN, INTERRUPTED, NOTHING_EVALUATED, SEARCH, Resumable
from prunevolve.configs import schema
from prunevolve.configs.schema import Config
from prunevolve.pruning.progress import step
from prunevolve.search.evolution import Evolution
from prunevolve.search.experiment import Experiment, pinned_config, resolve
from prunevolve.search.pool import guard
from prunevolve.search.pool.cluster import connected
from prunevolve.search.pool.in_process import InProcess
from prunevolve.search.pool.jobs import CallError
from prunevolve.search.pool.pool import Pool
from prunevolve.search.pool.workers import Backend
from prunevolve.search.prepare import check_identity, identity, prepare, settings, write_environment
from prunevolve.search.progress import FINISHED, OnRecord, Recorder, ignore
from prunevolve.search.records import Record
from prunevolve.search.resident import free_memory_as_usual
from prunevolve.search.results import finish, say_files, write_report
from prunevolve.search.run_folder import FolderError, RunFolder

_LEAST_LAG, _GOOD_LAG = 4, 16
"""Lags for each worker: with less than the first they wait for one another; with the second 95%
work though one evaluation in ten takes ten times as long."""


class Unfinished(RuntimeError):
    """A run stopped before its end; the message says why, and how to continue.

    Attributes:
        code: The exit code of the command line.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launch(config: Config, out: Path, console: Console, on_record: OnRecord = ignore) -> str:
    """Run a new search in an empty folder to its end; return in a word how it ended.

    Raises:
        Unfinished: If the run stopped before its end; its folder can usually be resumed.
        FolderError: If the folder is not empty or cannot be created.
        ValueError: If something is wrong with the config.
    """
    # Before the folder is created: an unavailable text or cluster must not leave a run behind.
    RunFolder.check_empty(out)
    experiment = _ready(pinned_config(config), console)
    with backend_of(experiment, console) as backend, closing(RunFolder.create(out)) as folder:
        return _run(folder, experiment, backend, [], console, on_record)


def resume(
    path: Path, overrides: Sequence[str], console: Console, on_record: OnRecord = ignore
) -> str:
    """Continue a run to its end, or extend a finished one; return in a word or two how it ended.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
        Unfinished: And anything else that `launch` raises.
    """
    with closing(RunFolder.open_(path)) as folder:
        config = schema.load(path / "config.yaml", overrides)  # refuses an unknown key
        check_identity(folder, settings(config))  # before a text is read
        records = folder.records()
        done, wanted = len(records), config.search.candidates
        if done == wanted and folder.is_finished(done):
            if not (path / "report.html").exists():  # killed before it was written
                write_report(folder)
            console.print(f"{path} is finished; nothing to do", soft_wrap=True)
            say_files(folder, config, console)
            return "finished before"
        experiment = _ready(config, console)
        check_identity(folder, identity(experiment))
        if wanted < done:
            raise FolderError(
                f"search.candidates = {wanted} is below the {done} that {path} has: give more"
            )
        with backend_of(experiment, console) as backend:
            return _run(folder, experiment, backend, records, console, on_record)


def _ready(config: Config, console: Console) -> Experiment:
    """Return the experiment with its texts, once all is checked that needs no worker."""
    experiment = resolve(config)
    with console.status("reading the texts"):  # no line, in case one is refused
        experiment = experiment.read_texts()
    for warning in experiment.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    return experiment


@contextmanager
def backend_of(experiment: Experiment, console: Console) -> Iterator[Backend]:
    """Open the workers' place that the config asks for; close it at the end, whatever happens.

    Raises:
        ValueError: If there is no such cluster, or it refuses the connection.
        PoolError: If the cluster is lost.
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

            backend = stack.enter_context(RayBackend(head, experiment))
        # The workers need the cores: on several threads the driver would wait for its own.
        torch.set_num_threads(1)
        yield backend


@contextmanager
def _resumable(folder: RunFolder) -> Iterator[str]:
    """Yield the command that goes on; raise Unfinished for whatever ends the run early."""
    command = f"{SEARCH} --resume {shlex.quote(str(folder.path))}"
    way_on = f"continue with {command}"
    guard.tell(f"resume {way_on}")
    try:
        yield command
    except KeyboardInterrupt as error:
        why = f"interrupted after {folder.lines} candidates"
        raise Unfinished(f"{why}; {way_on}", INTERRUPTED) from error
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
) -> str:
    """Prepare, breed and evaluate to the end, and measure the winner; say how the run ended.

    Args:
        records: The journal so far; emptied once it is replayed.
    """
    began = time.monotonic() - _seconds_before(folder)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    with _resumable(folder) as command:
        write_environment(folder, experiment)
        config = schema.to_yaml(experiment.config)
        if not (folder.path / "config.yaml").exists():
            folder.write_text("config.yaml", config)
        say(f"run folder {folder.path}")
        known, keep = folder.losses(), folder.keep_losses
        pool = Pool(backend, experiment, say=say, known=known, keep=keep)
        marks = prepare(folder, experiment, pool, console)
        folder.write_text("config.yaml", config)  # nothing will be refused any more
        lag, workers = experiment.config.search.lag, pool.workers.ready + pool.workers.starting
        if workers > 1 and lag < _LEAST_LAG * workers:
            say(
                f"warning: search.lag = {lag} is small for {workers} workers, which will wait for "
                f"one another: set search.lag={_GOOD_LAG * workers} in a new run; see "
                "docs/CLUSTER.md"
            )
        start = folder.read_checkpoint(records, lag, warn=lambda why: say(f"warning: {why}"))
        evolution = Evolution(experiment.breeder, experiment.weights, marks, start, records)
        with Recorder(folder, experiment, evolution, pool, console, on_record, began) as recorder:
            recorder.outcomes.update(record.outcome.kind for record in records)
            records.clear()  # frees the memory of what can be twenty thousand records
            _evolve(evolution, pool, recorder)
        if evolution.state.best is None:
            raise Unfinished(
                "error: no candidate was evaluated to the end; breed more: "
                f"{command} --set search.candidates=N",
                NOTHING_EVALUATED,
            )
        finish(folder, experiment, pool, evolution.state, began, console)
    return FINISHED


def _seconds_before(folder: RunFolder) -> float:
    """Return how long earlier processes worked on the run."""
    try:
        return float(str(folder.read_json("status.json", "seconds")["seconds"]))
    except ValueError:  # none was written, or by an earlier version
        return 0.0


def _evolve(evolution: Evolution, pool: Pool, recorder: Recorder) -> None:
    """Run the loop to its end; each record is in the journal before the next is committed."""
    while not evolution.done:
        for candidate in evolution.ask():
            if candidate.decided:
                recorder.enter(evolution.tell(candidate.index, candidate.decided))
            else:
                pool.submit(candidate)
        if not evolution.done and (arrival := pool.next_outcome()):
            recorder.note(arrival)
            recorder.enter(evolution.tell(arrival.index, arrival.outcome))
        recorder.show()
