"""From a config to a finished run: check, load, evolve, finish. Resume takes the same road."""

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from rich.console import Console

from command_line import called
from configs import schema
from configs.schema import Config
from interrupts import INTERRUPTED, Resumable
from search import trackers
from search.books import Books
from search.ending import BROKEN, DONE, NOTHING_EVALUATED, Ending
from search.evolution import Evolution
from search.experiment import Experiment, resolve
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


def launch(config: Config, out: Path, console: Console) -> Ending:
    """Run a new search in an empty folder, which is gone again if nothing came of it."""
    # Before the folder is made: a text or a cluster that cannot be had must not leave a run behind.
    RunFolder.check_empty(out)
    experiment = _ready(config, console)
    with _crew(experiment, console) as crew, closing(RunFolder.create(out)) as folder:
        try:
            ending = _run(folder, experiment, crew, [], console)
        finally:
            unused = folder.discard_if_unused()
    if ending.code == INTERRUPTED:
        again = "nothing was measured yet, and no folder is left: run the same command again"
        _say(console, ending, again if unused else f"continue with {_resume_call(out)}")
    return ending


def resume(path: Path, overrides: list[str], console: Console) -> Ending:
    """Continue a run, or extend a finished one; of one that is finished it only says so.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
    """
    for override in overrides:
        if not is_free(override.partition("=")[0]):
            raise FolderError(
                f"--set {override} would make {path} another search: a resumed run takes "
                "search.candidates, ray.*, memory.master and memory.scores alone"
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
            return _say_finished(folder, config, console)
        check_hub(config)
        experiment = _ready(config, console)
        with _crew(experiment, console) as crew:
            ending = _run(folder, experiment, crew, records, console)
    if ending.code == INTERRUPTED:
        _say(console, ending, f"continue with {_resume_call(path)}")
    return ending


def _resume_call(path: Path) -> str:
    return f"{called('run_search')} --resume {shlex.quote(str(path))}"


def _say(console: Console, ending: Ending, way_on: str) -> None:
    console.print(f"{ending.reason}; {way_on}", soft_wrap=True)


def _say_finished(folder: RunFolder, config: Config, console: Console) -> Ending:
    """Say that there is nothing to do, what the result is, and how to go further."""
    if not (folder.path / "report.html").exists():  # a kill came between
        write_report(folder)
    done = config.search.candidates
    console.print(
        f"{folder.path} is finished: all {done} candidates are evaluated and the result is "
        f"measured; breed more: {_resume_call(folder.path)} --set search.candidates=N",
        soft_wrap=True,
    )
    say_files(folder, config, console)
    return Ending(DONE, "finished before", folder.path)


def _ready(config: Config, console: Console) -> Experiment:
    experiment = resolve(config)
    check_cores(config.ray)
    memory_lines(experiment)  # refuses what cannot fit
    trackers.check(config.trackers)
    with step(console, "reading the texts"):
        return experiment.read_texts()


def _run(
    folder: RunFolder,
    experiment: Experiment,
    crew: Crew,
    records: list[Record],
    console: Console,
) -> Ending:
    """Run to the end, or to what ends it; what is written by then can be resumed.

    Args:
        records: The journal so far; emptied once it is replayed.
    """
    where = experiment.config.ray
    most = 1 if where.workers == 0 else where.workers
    try:
        folder.write_text("config.yaml", schema.to_yaml(experiment.config))
        console.print(f"run folder {folder.path}", soft_wrap=True)
        pool = WorkerPool(
            crew,
            experiment.setup,
            most,
            where.wait_seconds,
            where.start_seconds,
            say=lambda line: console.print(line, soft_wrap=True),
        )
        return _search(folder, experiment, pool, records, console)
    except KeyboardInterrupt:
        reason = f"interrupted after {folder.lines} candidates"
        return Ending(INTERRUPTED, reason, folder.path)
    except Resumable as error:
        return Ending(INTERRUPTED, f"error: {error}", folder.path)
    except CallError as error:
        folder.write_failure("run", error.trace)
        reason = f"error: {error}; see {folder.path / 'failures/run.txt'}"
        console.print(reason, soft_wrap=True)
        return Ending(BROKEN, reason, folder.path)


def _search(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    records: list[Record],
    console: Console,
) -> Ending:
    started = time.monotonic()
    marks = prepare(folder, experiment, pool, console)
    evolution = evolve(folder, experiment, pool, marks, records, console)
    state = evolution.state
    if state.best is None:
        reason = "error: no candidate was evaluated to the end"
        ending = Ending(NOTHING_EVALUATED, reason, folder.path)
        _say(console, ending, f"breed more: {_resume_call(folder.path)} --set search.candidates=N")
        return ending
    members = [record.criterion for record in state.population]
    diversity = marks.diversity(members, experiment.config.search.crowding)
    finish(folder, experiment, pool, state, diversity, started, console)
    status = folder.read_json("status.json")
    folder.write_json("status.json", {**status, "state": FINISHED})
    return Ending(DONE, FINISHED, folder.path)


@contextmanager
def _crew(experiment: Experiment, console: Console) -> Iterator[Crew]:
    """Open what the config asks workers to live in; gone at the end, whatever happens.

    Raises:
        ValueError: If there is no such device or cluster, or it does not let us in.
        PoolError: If the cluster answered, and hangs.
    """
    setup, where = experiment.setup, experiment.config.ray
    if where.workers == 0:
        if where.gpus_per_worker and not torch.cuda.is_available():
            raise ValueError(
                f"ray.gpus_per_worker = {where.gpus_per_worker}, and this machine has no CUDA "
                "device: set it to 0"
            )
        yield InProcessCrew(setup)
        return
    # Imported here, so that neither --validate nor an in-process run starts to load Ray.
    local_cpus = where.address == "local" and not where.gpus_per_worker
    cores = max(os.cpu_count() or 1, where.cpus_per_worker * (where.workers or 1))
    with ExitStack() as stack:
        with step(console, f"connecting to Ray: {where.address}"):
            from search.pool.cluster import connection
            from search.pool.on_ray import RayCrew

            cluster = stack.enter_context(connection(where.address, cores))
            ships = where.ship_model or local_cpus
            crew = RayCrew(cluster, setup, where.cpus_per_worker, where.gpus_per_worker, ships)
        yield crew


def evolve(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    marks: Fingerprints,
    records: list[Record],
    console: Console,
) -> Evolution:
    """Run the loop to its end; each record is in the journal before the next is committed."""
    search = experiment.config.search
    tells = marks if search.fingerprint else None
    scale = read_scale(folder)
    assert scale, "prepare comes before"
    check_records(folder, experiment, tells, records)
    start = folder.read_checkpoint(max(0, len(records) - search.lag))
    evolution = Evolution(experiment.settings, tells, start, records)
    with (
        Screen(console) as screen,
        trackers.opened(experiment.config.trackers, folder.path) as tracked,
        Books(folder, experiment, evolution, scale, pool, screen, tracked) as books,
    ):
        books.outcomes.update(record.outcome.kind for record in records)
        records.clear()  # twenty thousand of them would stay all the while
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
