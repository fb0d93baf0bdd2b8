"""From a config to a finished run: check, load, evolve, finish. Resume takes the same road."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor

from configs import schema
from configs.schema import Config
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Fingerprints, Probe, tensors_digest
from search.finish import finish, write_report
from search.journal import FolderError, RunFolder
from search.machine import description, memory_lines
from search.pool.crew import Crew
from search.pool.in_process import InProcessCrew
from search.pool.protocol import Pool, PoolError, Timing
from search.pool.worker_pool import WorkerPool
from search.population import Record
from search.screen import Screen

DONE, INTERRUPTED, NOTHING_EVALUATED = 0, 3, 5
"""Exit codes; 2 is a usage or config error and 4 a folder that does not fit."""

RESUMABLE_KEYS = ("search.candidates", "ray.", "memory.master=", "memory.scores=")
"""What `--set` may change of a run that is there: how long and where, never what."""


def launch(config: Config, out: Path, console: Console) -> int:
    """Run a new search in an empty folder; returns the exit code."""
    # Before the folder is made: a text that cannot be had must not leave a run behind.
    experiment = _ready(config)
    folder = RunFolder.create(out)
    try:
        return _run(folder, experiment, console)
    finally:
        folder.close()


def resume(path: Path, overrides: list[str], console: Console) -> int:
    """Continue a run, or extend a finished one; returns the exit code.

    Raises:
        FolderError: If the folder is no run, is damaged, or an override would change the search.
    """
    for override in overrides:
        if not override.startswith(RESUMABLE_KEYS):
            raise FolderError(
                f"--set {override} would make {path} another search: a resumed run takes "
                "search.candidates, ray.*, memory.master and memory.scores alone"
            )
    folder = RunFolder.open_(path)
    try:
        config = schema.load(path / "config.yaml", overrides)
        done = len(folder.read_records())
        if config.search.candidates < done:
            raise FolderError(
                f"search.candidates = {config.search.candidates} is below the {done} that "
                f"{path} has: give more"
            )
        return _run(folder, _ready(config), console)
    finally:
        folder.close()


def rebuild_report(path: Path, console: Console) -> int:
    """Rebuild `report.html` of a finished run; returns the exit code."""
    folder = RunFolder.open_(path)
    try:
        write_report(folder)
        console.print(f"wrote {path / 'report.html'}", soft_wrap=True)
        return DONE
    finally:
        folder.close()


def _ready(config: Config) -> Experiment:
    experiment = resolve(config)
    memory_lines(experiment)  # refuses what cannot fit
    return experiment.read_texts()


def _run(folder: RunFolder, experiment: Experiment, console: Console) -> int:
    started = time.monotonic()
    folder.write_text("config.yaml", schema.to_yaml(experiment.config))
    console.print(f"run folder {folder.path}", soft_wrap=True)
    try:
        with _pool(experiment) as pool:
            # After Ray's start, which takes SIGTERM for itself and aborts. SIGINT too: a shell
            # starts its background jobs with it ignored.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _interrupt)
            marks = _prepare(folder, experiment, pool, console)
            evolution = _evolve(folder, experiment, pool, marks, console)
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
    except KeyboardInterrupt:
        console.print(
            f"interrupted after {len(folder.read_records())} candidates; continue with "
            f"run_search.py --resume {folder.path}",
            soft_wrap=True,
        )
        return INTERRUPTED
    except PoolError as error:
        console.print(
            f"error: {error}; continue with run_search.py --resume {folder.path}", soft_wrap=True
        )
        return INTERRUPTED
    return DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which clusters send before they kill, and SIGINT as Ctrl-C."""
    raise KeyboardInterrupt


@contextmanager
def _pool(experiment: Experiment) -> Iterator[Pool]:
    """Open the pool that the config asks for; closed at the end, whatever happens."""
    where = experiment.config.ray
    with _crew(experiment) as crew:
        most = 1 if where.workers == 0 else where.workers
        yield WorkerPool(crew, experiment.setup, most, where.wait_seconds, where.start_seconds)


@contextmanager
def _crew(experiment: Experiment) -> Iterator[Crew]:
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
    with connection(where.address, cores):
        ships = where.ship_model or local_cpus
        yield RayCrew(setup, where.cpus_per_worker, where.gpus_per_worker, ships)


def _prepare(
    folder: RunFolder, experiment: Experiment, pool: Pool, console: Console
) -> Fingerprints:
    """Get statistics and probes, from the folder or from a worker, and check the environment.

    Raises:
        FolderError: If models, texts or statistics are not those that the run began with.
    """
    found: dict[str, list[object]] = {"model": [], "texts": [], "statistics": []}
    probes = []
    for subject in range(len(experiment.subjects)):
        statistics = _statistics(folder, experiment, subject, pool, console)
        texts = experiment.provenance(subject)
        found["model"].append(pool.model_digest(subject))
        found["texts"].append({role: text["text_sha256"] for role, text in texts.items()})
        found["statistics"].append(tensors_digest(statistics))
        probes.append(_probe(folder, subject, pool))
    if (folder.path / "environment.json").exists():
        before = folder.read_json("environment.json", "fingerprints")["fingerprints"]
        for name, now in found.items():
            if before.get(name) != now:
                raise FolderError(
                    f"the run's {name} had fingerprint {before.get(name)} and has {now} here: "
                    "resume with what it began with, or start a new run"
                )
    else:
        folder.write_json("environment.json", {**description(), "fingerprints": found})
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


def _probe(folder: RunFolder, subject: int, pool: Pool) -> Probe:
    name = f"probe{subject or ''}.safetensors"
    probe = folder.read_tensors(name)
    if probe is None:
        probe = dict(pool.probe_tensors(subject))
        folder.write_tensors(name, probe)
    return Probe.from_tensors(probe)


def _evolve(
    folder: RunFolder, experiment: Experiment, pool: Pool, marks: Fingerprints, console: Console
) -> Evolution:
    """Run the loop to its end; each record is in the journal before the next is committed."""
    search = experiment.config.search
    records = folder.read_records()
    start = folder.read_checkpoint(max(0, len(records) - search.lag))
    evolution = Evolution(
        experiment.settings, marks if search.fingerprint else None, start, records
    )
    timings: dict[int, Timing] = {}
    outcomes = Counter(record.outcome.kind for record in records)
    with Screen(console, search.candidates, outcomes) as screen:

        def commit(records: list[Record]) -> None:
            for record in records:
                folder.append(record, timings.pop(record.index, {}))
                screen.show(record, evolution.state)
            if records and _passes(search.checkpoint_every, records):
                folder.write_checkpoint(evolution.resumable, evolution.state)

        try:
            while not evolution.done:
                for candidate in evolution.ask():
                    if candidate.decided:
                        commit(evolution.tell(candidate.index, candidate.decided))
                    else:
                        pool.submit(candidate)
                if not evolution.done and (arrival := pool.next_outcome()):
                    timings[arrival.index] = arrival.timing
                    commit(evolution.tell(arrival.index, arrival.outcome))
        finally:
            folder.write_checkpoint(evolution.resumable, evolution.state)
            if evolution.state.best:
                folder.write_best(evolution.state.best, experiment.origin())
    return evolution


def _passes(step: int, records: list[Record]) -> bool:
    """Tell whether records, in order, reach or pass a multiple of a step."""
    return (records[-1].index + 1) // step > records[0].index // step
