"""From a config to a finished run: check, load, evolve, finish. Resume takes the same road."""

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from configs import schema
from configs.schema import Config
from search import interrupts, trackers
from search.books import Books
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Fingerprints, Probe, tensors_digest
from search.finish import finish, read_scale, write_report
from search.identity import check_config, check_fingerprints, check_records, is_free
from search.journal import FolderError, RunFolder, WriteError
from search.machine import memory_lines
from search.pool.crew import Crew
from search.pool.in_process import InProcessCrew
from search.pool.protocol import CallError, Pool, PoolError
from search.pool.worker_pool import WorkerPool
from search.population import Record
from search.scale import Scale
from search.screen import Screen
from search.yardstick import scale_of

DONE, BROKEN, NOTHING_EVALUATED = 0, 1, 5
"""Exit codes; 2 is a usage or config error, 3 a run that can be resumed, 4 a folder that does not
fit."""


def launch(config: Config, out: Path, console: Console) -> int:
    """Run a new search in an empty folder; returns the exit code."""
    # Before the folder is made: a text or a cluster that cannot be had must not leave a run behind.
    RunFolder.check_empty(out)
    experiment = _ready(config)
    with _crew(experiment) as crew, closing(RunFolder.create(out)) as folder:
        return _run(folder, experiment, crew, [], console)


def resume(path: Path, overrides: list[str], console: Console) -> int:
    """Continue a run, or extend a finished one; returns the exit code.

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
        experiment = _ready(config)
        with _crew(experiment) as crew:
            return _run(folder, experiment, crew, records, console)


def rebuild_report(path: Path, console: Console) -> int:
    """Rebuild `report.html` of a finished run; returns the exit code."""
    with closing(RunFolder.open_(path)) as folder:
        write_report(folder)
    console.print(f"wrote {path / 'report.html'}", soft_wrap=True)
    return DONE


def _ready(config: Config) -> Experiment:
    experiment = resolve(config)
    memory_lines(experiment)  # refuses what cannot fit
    trackers.check(config.trackers)
    return experiment.read_texts()


def _run(
    folder: RunFolder,
    experiment: Experiment,
    crew: Crew,
    records: list[Record],
    console: Console,
) -> int:
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
        why = f"interrupted after {folder.lines} candidates"
    except (PoolError, WriteError) as error:
        why = f"error: {error}"
    except CallError as error:
        folder.write_failure("run", error.trace)
        console.print(f"error: {error}; see {folder.path / 'failures/run.txt'}", soft_wrap=True)
        return BROKEN
    console.print(f"{why}; continue with run_search.py --resume {folder.path}", soft_wrap=True)
    return interrupts.INTERRUPTED


def _search(
    folder: RunFolder,
    experiment: Experiment,
    pool: Pool,
    records: list[Record],
    console: Console,
) -> int:
    started = time.monotonic()
    marks = _prepare(folder, experiment, pool, console)
    evolution = evolve(folder, experiment, pool, marks, records, console)
    state = evolution.state
    if state.best is None:
        console.print(
            "error: no candidate was evaluated to the end; breed more: "
            f"run_search.py --resume {folder.path} --set search.candidates=N",
            soft_wrap=True,
        )
        return NOTHING_EVALUATED
    members = [record.criterion for record in state.population]
    diversity = marks.diversity(members, experiment.config.search.crowding)
    finish(folder, experiment, pool, state, diversity, started, console)
    status = folder.read_json("status.json")
    folder.write_json("status.json", {**status, "state": "finished"})
    return DONE


@contextmanager
def _crew(experiment: Experiment) -> Iterator[Crew]:
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
    from search.pool.cluster import connection
    from search.pool.on_ray import RayCrew

    local_cpus = where.address == "local" and not where.gpus_per_worker
    cores = max(os.cpu_count() or 1, where.cpus_per_worker * (where.workers or 1))
    with connection(where.address, cores) as cluster:
        ships = where.ship_model or local_cpus
        yield RayCrew(cluster, setup, where.cpus_per_worker, where.gpus_per_worker, ships)


def _prepare(
    folder: RunFolder, experiment: Experiment, pool: Pool, console: Console
) -> Fingerprints:
    """Get statistics, probes and scale, from the folder or workers, and check the environment.

    Raises:
        FolderError: If models, texts or statistics are not those that the run began with.
    """
    found: dict[str, list[object]] = {
        name: [] for name in ("model", "texts", "windows", "statistics", "probe", "scale")
    }
    probes = []
    for subject in range(len(experiment.subjects)):
        statistics = _statistics(folder, experiment, subject, pool, console)
        texts = experiment.windows[subject]
        probe = _probe(folder, subject, pool)
        found["model"].append(pool.model_digest(subject))
        found["texts"].append({r: w.provenance["text_sha256"] for r, w in texts.items()})
        found["windows"].append(tensors_digest({r: w.tokens for r, w in texts.items()}))
        found["statistics"].append(tensors_digest(statistics))
        found["probe"].append(tensors_digest(probe))
        probes.append(Probe.from_tensors(probe))
    scale = _scale(folder, experiment, pool, console)
    found["scale"].append(scale.digest())
    check_fingerprints(folder, experiment, found)
    return Fingerprints([(probes[task.subject], task.target) for task in experiment.tasks])


def _statistics(
    folder: RunFolder, experiment: Experiment, subject: int, pool: Pool, console: Console
) -> dict[str, Tensor]:
    """Return a model's statistics, which all workers have then."""
    name = f"statistics{subject or ''}.safetensors"
    statistics = folder.read_tensors(name)
    if statistics is None:
        tokens = experiment.provenance(subject)["calibration"]["tokens"]
        model = experiment.subjects[subject].model
        console.print(f"collecting statistics of {model} on {tokens} tokens", soft_wrap=True)
        statistics = dict(pool.collect_statistics(subject))
        folder.write_tensors(name, statistics)
    pool.use_statistics(subject, statistics)
    return statistics


def _probe(folder: RunFolder, subject: int, pool: Pool) -> dict[str, Tensor]:
    name = f"probe{subject or ''}.safetensors"
    probe = folder.read_tensors(name)
    if probe is None:
        probe = dict(pool.probe_tensors(subject))
        folder.write_tensors(name, probe)
    return probe


def _scale(folder: RunFolder, experiment: Experiment, pool: Pool, console: Console) -> Scale:
    """Return the scale of a fitness, which all workers have then."""
    scale = read_scale(folder)
    if scale is None:
        setup, aggregate = experiment.setup, experiment.config.search.aggregate
        console.print("measuring the dense model and the named metrics on the fitness text")
        seconds = pool.seconds_of_tasks() if len(setup.tasks) > 1 else ()
        scale = scale_of(setup, aggregate, pool.losses, seconds=seconds)
        folder.write_json("scale.json", scale.model_dump())
    pool.use_scale(scale)
    return scale


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
    check_records(folder, experiment, tells, records)
    start = folder.read_checkpoint(max(0, len(records) - search.lag))
    evolution = Evolution(experiment.settings, tells, start, records)
    with (
        Screen(console) as screen,
        trackers.opened(experiment.config.trackers, folder.path) as tracked,
        Books(folder, experiment, evolution, pool, screen, tracked) as books,
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
