"""From a config to a finished run: check, load, evolve, finish. Resuming takes the same path.

The command line calls `launch` and `resume`, which print how a run ended. `run` and `run_on` do
the work, and raise `Unfinished`.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from command_line import BROKEN, DONE, INTERRUPTED, NOTHING_EVALUATED, called
from configs import schema
from configs.schema import Config
from interrupts import Resumable
from search import trackers
from search.books import Books, OnRecord, ignore
from search.ending import Ending
from search.evolution import Evolution
from search.experiment import Experiment, pinned_config, resolve
from search.fingerprint import Fingerprints
from search.finish import finish, say_files, write_report
from search.identity import check_config, check_records, is_free
from search.journal import FolderError, RunFolder
from search.machine import check_cores, memory_lines
from search.names import check_hub
from search.pool.crew import Crew
from search.pool.in_process import InProcessCrew
from search.pool.protocol import CallError, Pool
from search.pool.worker_pool import WorkerPool
from search.population import Record
from search.prepare import prepare, read_scale
from search.screen import Screen, step
from search.status import FINISHED

_NOTHING_LEFT = "nothing was measured yet, and no folder is left: run the same command again"


class Unfinished(RuntimeError):
    """A run stopped before its end; the message says why, and how to continue.

    Attributes:
        code: The exit code of the command line.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def launch(config: Config, out: Path, console: Console) -> Ending:
    """Run a new search in an empty folder, and print how it ended."""
    return _ending(console, out, lambda: run(config, out, console))


def resume(path: Path, overrides: Sequence[str], console: Console) -> Ending:
    """Continue a run, or extend a finished one, and print how it ended.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
    """
    return _ending(console, path, lambda: run_on(path, overrides, console))


def _ending(console: Console, folder: Path, work: Callable[[], str]) -> Ending:
    try:
        return Ending(DONE, work(), folder)
    except Unfinished as end:
        console.print(str(end), soft_wrap=True)
        return Ending(end.code, str(end), folder)


def run(config: Config, out: Path, console: Console, on_record: OnRecord = ignore) -> str:
    """Run a new search in an empty folder to its end; remove the folder if nothing was measured.

    Args:
        on_record: Called with each record once it is in the journal, in order.

    Returns:
        How the run ended, in a word.

    Raises:
        Unfinished: If the run stopped before its end; its folder can usually be resumed.
        FolderError: If the folder is not empty or cannot be created.
        ValueError: If something is wrong with the config.
        Exception: Whatever `on_record` raises, after a checkpoint.
    """
    # Before the folder is created: an unavailable text or cluster must not leave a run behind.
    RunFolder.check_empty(out)
    experiment = _ready(pinned_config(config), console)
    with _crew(experiment, console) as crew, closing(RunFolder.create(out)) as folder:

        def advice() -> str:
            return _NOTHING_LEFT if folder.discard_if_unused() else _continue_with(out)

        try:
            return _run(folder, experiment, crew, [], console, on_record, advice)
        finally:
            folder.discard_if_unused()


def run_on(
    path: Path, overrides: Sequence[str], console: Console, on_record: OnRecord = ignore
) -> str:
    """Continue a run to its end, or extend a finished one; if there is nothing to do, say so.

    Args:
        on_record: Called with each new record.

    Returns:
        How the run ended, in a word or two.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
        Unfinished: And anything else that `run` raises.
    """
    for override in overrides:
        if not is_free(override.partition("=")[0]):
            raise FolderError(
                f"--set {override} would make {path} a different search: a resumed run accepts "
                "only search.candidates, ray.*, memory.master and memory.scores"
            )
    with closing(RunFolder.open_(path)) as folder:
        config = schema.load(path / "config.yaml", overrides)
        records = folder.read_records()
        done = len(records)
        check_config(folder, config, done)
        if config.search.candidates < done:
            raise FolderError(
                f"search.candidates = {config.search.candidates} is below the {done} that "
                f"{path} has: give more"
            )
        if done == config.search.candidates and folder.is_finished(done):
            _say_finished(folder, config, console)
            return "finished before"
        check_hub(config)
        experiment = _ready(config, console)
        with _crew(experiment, console) as crew:
            advice = partial(_continue_with, path)
            return _run(folder, experiment, crew, records, console, on_record, advice)


def _resume_call(path: Path) -> str:
    return f"{called('run_search')} --resume {shlex.quote(str(path))}"


def _continue_with(path: Path) -> str:
    return f"continue with {_resume_call(path)}"


def _say_finished(folder: RunFolder, config: Config, console: Console) -> None:
    """Say that there is nothing to do, where the result is, and how to extend the run."""
    if not (folder.path / "report.html").exists():  # killed before it was written
        write_report(folder)
    done = config.search.candidates
    console.print(
        f"{folder.path} is finished: all {done} candidates are evaluated and the result is "
        f"measured; breed more: {_resume_call(folder.path)} --set search.candidates=N",
        soft_wrap=True,
    )
    say_files(folder, config, console)


def _ready(config: Config, console: Console) -> Experiment:
    experiment = resolve(config)
    check_cores(config.ray)
    memory_lines(experiment)  # refuses what cannot fit
    trackers.check(config.trackers)
    with step(console, "reading the texts"):
        experiment = experiment.read_texts()
    for warning in experiment.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    return experiment


def _run(
    folder: RunFolder,
    experiment: Experiment,
    crew: Crew,
    records: list[Record],
    console: Console,
    on_record: OnRecord,
    advice: Callable[[], str],
) -> str:
    """Run to the end; if the run stops before, what it has written can be resumed.

    Args:
        records: The journal so far; emptied once it is replayed.
        advice: Returns how to continue after an interrupt.

    Raises:
        Unfinished: If the run stopped before its end.
    """
    ray = experiment.config.ray
    workers = 1 if ray.workers == 0 else ray.workers
    try:
        folder.write_text("config.yaml", schema.to_yaml(experiment.config))
        console.print(f"run folder {folder.path}", soft_wrap=True)
        pool = WorkerPool(
            crew,
            experiment.setup,
            workers,
            ray.wait_seconds,
            ray.start_seconds,
            say=lambda line: console.print(line, soft_wrap=True),
        )
        return _search(folder, experiment, pool, records, console, on_record)
    except KeyboardInterrupt as error:
        why = f"interrupted after {folder.lines} candidates"
        raise Unfinished(f"{why}; {advice()}", INTERRUPTED) from error
    except Resumable as error:
        raise Unfinished(f"error: {error}; {advice()}", INTERRUPTED) from error
    except CallError as error:
        folder.write_failure("run", error.trace)
        trace = folder.path / "failures/run.txt"
        raise Unfinished(f"error: {error}; see {trace}", BROKEN) from error


def _search(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    records: list[Record],
    console: Console,
    on_record: OnRecord,
) -> str:
    started = time.monotonic()
    marks = prepare(folder, experiment, pool, console)
    evolution = evolve(folder, experiment, pool, marks, records, console, on_record)
    state = evolution.state
    if state.best is None:
        raise Unfinished(
            "error: no candidate was evaluated to the end; breed more: "
            f"{_resume_call(folder.path)} --set search.candidates=N",
            NOTHING_EVALUATED,
        )
    members = [record.criterion for record in state.population]
    diversity = marks.diversity(members, experiment.config.search.crowding)
    finish(folder, experiment, pool, state, diversity, started, console)
    status = folder.read_json("status.json")
    folder.write_json("status.json", {**status, "state": FINISHED})
    return FINISHED


@contextmanager
def _crew(experiment: Experiment, console: Console) -> Iterator[Crew]:
    """Open the crew that the config asks for; close it at the end, whatever happens.

    Raises:
        ValueError: If there is no such device or cluster, or it refuses the connection.
        PoolError: If the cluster answered the probe and then fails or hangs.
    """
    setup, ray = experiment.setup, experiment.config.ray
    if ray.workers == 0:
        if ray.gpus_per_worker and not torch.cuda.is_available():
            raise ValueError(
                f"ray.gpus_per_worker = {ray.gpus_per_worker}, but this machine has no CUDA "
                "device: set it to 0"
            )
        yield InProcessCrew(setup)
        return
    local_cpus = ray.address == "local" and not ray.gpus_per_worker
    cores = max(os.cpu_count() or 1, ray.cpus_per_worker * (ray.workers or 1))
    with ExitStack() as stack:
        with step(console, f"connecting to Ray: {ray.address}"):
            # Imported here, so that neither --validate nor an in-process run loads Ray.
            from search.pool.cluster import connection
            from search.pool.on_ray import RayCrew

            cluster = stack.enter_context(connection(ray.address, cores))
            ships = ray.ship_model or local_cpus
            # The workers need the cores: on several threads the driver would wait for its own.
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            crew = RayCrew(cluster, setup, ray.cpus_per_worker, ray.gpus_per_worker, ships)
        yield crew


def evolve(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    marks: Fingerprints,
    records: list[Record],
    console: Console,
    on_record: OnRecord = ignore,
) -> Evolution:
    """Run the loop to its end; each record is in the journal before the next is committed."""
    search = experiment.config.search
    used_marks = marks if search.fingerprint else None
    scale = read_scale(folder)
    assert scale, "prepare must come before evolve"
    check_records(folder, experiment, used_marks, records)
    start = folder.read_checkpoint(max(0, len(records) - search.lag))
    evolution = Evolution(experiment.settings, used_marks, start, records)
    with (
        Screen(console) as screen,
        trackers.opened(experiment.config.trackers, folder.path) as tracked,
        Books(folder, experiment, evolution, scale, pool, screen, tracked, on_record) as books,
    ):
        books.outcomes.update(record.outcome.kind for record in records)
        records.clear()  # frees the memory of what can be twenty thousand records
        while not evolution.done:
            for candidate in evolution.ask():
                if candidate.decided:
                    books.enter(evolution.tell(candidate.index, candidate.decided))
                else:
                    pool.submit(candidate)
            if not evolution.done and (arrival := pool.next_outcome()):
                books.note(arrival)
                books.enter(evolution.tell(arrival.index, arrival.outcome))
            books.show()
    return evolution
