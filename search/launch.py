"""From a config to a finished run: check, load, evolve, finish. Resume takes the same road."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from configs import schema
from configs.schema import Config
from pruning.masks import GROUPS
from search.breeding.primitives import primitive_set
from search.breeding.variation import Variation
from search.evolution import Settings, evolve, replay
from search.fingerprint import Fingerprints, Probe, tensors_digest
from search.finish import finish, write_report
from search.fitness import Evaluator, InProcessPool, Setup
from search.journal import FolderError, RunFolder
from search.plan import Plan, leaves_of, load_plan
from search.population import Candidate, Record, Rules, State
from search.resident import Memory
from search.run import Run, environment
from search.screen import Screen
from search.seeds import read_seeds, write_seeds
from search.validation import memory_lines, validate

DONE, INTERRUPTED, NOTHING_EVALUATED = 0, 3, 5
"""Exit codes; 2 is a usage or config error and 4 a folder that does not fit."""

RESUMABLE_KEYS = ("search.candidates", "ray.", "memory.master=", "memory.scores=")
"""What `--set` may change of a run that is there: how long and where, never what."""


def launch(config: Config, out: Path, console: Console) -> int:
    """Run a new search in an empty folder; returns the exit code."""
    validate(config)
    memory_lines(config)  # refuses what cannot fit
    # Before the folder is made: a text that cannot be had must not leave a run behind.
    plan = load_plan(config)
    # As texts: the run folder alone must be enough to resume.
    seeds = write_seeds(read_seeds(config.search.seeds, groups_of(config)))
    config = schema.parse(
        {**config.model_dump(), "search": {**config.search.model_dump(), "seeds": seeds}}, "seeds"
    )
    folder = RunFolder.create(out)
    try:
        folder.write_text("config.yaml", schema.to_yaml(config))
        return _run(folder, config, plan, console)
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
        validate(config)
        plan = load_plan(config)
        folder.write_text("config.yaml", schema.to_yaml(config))
        return _run(folder, config, plan, console)
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


def groups_of(config: Config) -> tuple[str, ...]:
    """Return the comparison groups that candidates may have; n:m patterns know no other."""
    if all(task.pattern != "unstructured" for task in config.all_tasks):
        return ("row",)
    group = config.pruning.group
    return GROUPS if group == "free" else (group,)


def settings_of(config: Config, fingerprints: Fingerprints) -> Settings:
    """Return the loop's knobs from a config."""
    search = config.search

    def near(one: Candidate | Record, other: Record) -> bool:
        names = (one.metric, one.group), (other.metric, other.group)
        return fingerprints.distance(*names) < search.crowding

    return Settings(
        seed=search.seed,
        candidates=search.candidates,
        rules=Rules(
            capacity=search.population,
            resolution=search.parsimony,
            kept=int(search.population * search.speciation / len(groups_of(config))),
            patience=search.patience,
            lag=search.lag,
            **({"near": near} if search.crowding and search.fingerprint else {}),
        ),
        groups=groups_of(config),
        regroup=search.regroup,
        within=search.speciation,
        seeds=tuple(read_seeds(search.seeds, groups_of(config))),
        pool=search.pool,
        parents=search.parents,
        simplified=search.simplify,
        variation=Variation(
            primitives=primitive_set(search.primitives),
            min_initial_depth=search.min_initial_depth,
            max_initial_depth=search.max_initial_depth,
            max_depth=search.max_depth,
            max_size=search.max_size,
            crossover=search.crossover,
            mutation=search.mutation,
            mutations=search.mutations.model_dump(),
        ),
    )


def _run(folder: RunFolder, config: Config, plan: Plan, console: Console) -> int:
    started = time.monotonic()
    console.print(f"run folder {folder.path}", soft_wrap=True)
    records = folder.read_records()
    try:
        with _pool(config, plan) as pool:
            # After Ray's start, which takes SIGTERM for itself and aborts. SIGINT too: a shell
            # starts its background jobs with it ignored.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _interrupt)
            run = Run(folder, config, plan, pool, console)
            fingerprints = _prepare(run)
            state = _evolve(run, fingerprints, records)
            if state.best is None:
                console.print(
                    "error: no candidate was evaluated to the end; breed more: "
                    f"run_search.py --resume {folder.path} --set search.candidates=N",
                    soft_wrap=True,
                )
                return NOTHING_EVALUATED
            members = [(one.metric, one.group) for one in state.population]
            diversity = fingerprints.diversity(members, config.search.crowding)
            finish(run, records, state, diversity, lambda: time.monotonic() - started)
    except KeyboardInterrupt:
        console.print(
            f"interrupted after {len(records)} candidates; continue with "
            f"run_search.py --resume {folder.path}",
            soft_wrap=True,
        )
        return INTERRUPTED
    return DONE


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM, which clusters send before they kill, and SIGINT as Ctrl-C."""
    raise KeyboardInterrupt


def setup_of(config: Config, plan: Plan) -> Setup:
    """Return what evaluators are built from."""
    search, where = config.search, config.ray
    return Setup(
        subjects=plan.subjects,
        windows=tuple({r: w.tokens for r, w in texts.items()} for texts in plan.windows),
        tasks=plan.tasks,
        leaves=leaves_of(config),
        objective=search.objective,
        device="cuda" if where.gpus_per_worker else "cpu",
        threads=where.cpus_per_worker,
        stages=tuple(search.stages),
        slack=search.slack,
        hopeless=search.hopeless,
        memory=Memory(**config.memory.model_dump()),
    )


@contextmanager
def _pool(config: Config, plan: Plan) -> Iterator[Any]:
    """Open the pool that the config asks for; closed at the end, whatever happens."""
    setup, where = setup_of(config, plan), config.ray
    if where.workers == 0:
        if where.gpus_per_worker and not torch.cuda.is_available():
            raise ValueError(
                f"ray.gpus_per_worker = {where.gpus_per_worker}, and this machine has no CUDA "
                "device: set it to 0"
            )
        yield InProcessPool(Evaluator(setup))
        return
    # Imported here, so that neither --validate nor an in-process run starts to load Ray.
    from search.workers import RayPool

    pool = RayPool(
        setup, where.address, where.workers, where.cpus_per_worker, where.gpus_per_worker
    )
    try:
        yield pool
    finally:
        pool.close()


def _prepare(run: Run) -> Fingerprints:
    """Get statistics and probes, from the folder or from a worker, and check the environment.

    Raises:
        FolderError: If models, texts or statistics are not those that the run began with.
    """
    found: dict[str, Any] = {"model": [], "texts": [], "statistics": []}
    probes = []
    for subject in range(len(run.plan.subjects)):
        statistics = _statistics(run, subject)
        found["model"].append(run.pool.call("model_digest", subject))
        texts = run.texts(subject)
        found["texts"].append({role: text["text_sha256"] for role, text in texts.items()})
        found["statistics"].append(tensors_digest(statistics))
        probes.append(_probe(run, subject))
    if (run.folder.path / "environment.json").exists():
        before = run.folder.read_json("environment.json", "fingerprints")
        _check_same(before["fingerprints"], found)
    else:
        run.folder.write_json("environment.json", environment(found))
    return Fingerprints([(probes[task.subject], task.target) for task in run.plan.tasks])


def _statistics(run: Run, subject: int) -> dict[str, Tensor]:
    """Return a model's statistics, which all workers have then."""
    name = f"statistics{subject or ''}.safetensors"
    statistics = run.folder.read_tensors(name)
    if statistics is None:
        tokens = run.texts(subject)["calibration"]["tokens"]
        model = run.plan.subjects[subject].model
        run.console.print(f"collecting statistics of {model} on {tokens} tokens", soft_wrap=True)
        statistics = run.pool.call("collect_statistics", subject)
        run.folder.write_tensors(name, statistics)
    run.pool.share_statistics(subject, statistics)
    return dict(statistics)


def _probe(run: Run, subject: int) -> Probe:
    name = f"probe{subject or ''}.safetensors"
    probe = run.folder.read_tensors(name)
    if probe is None:
        probe = run.pool.call("probe_tensors", subject)
        run.folder.write_tensors(name, probe)
    return Probe.from_tensors(probe)


def _evolve(run: Run, fingerprints: Fingerprints, records: list[Record]) -> State:
    """Run the loop to its end; new records are appended to `records` as they are committed."""
    settings = settings_of(run.config, fingerprints)
    start = resumable = run.folder.read_checkpoint(max(0, len(records) - settings.rules.lag))
    state = replay(settings.rules, start, records)[len(records)]
    mark = fingerprints.fingerprint if run.config.search.fingerprint else None
    loop = evolve(settings, mark, run.pool, start, records[:])
    with Screen(run.console, settings.candidates, len(records)) as screen:
        screen.outcomes.update(Counter(record.outcome for record in records))
        try:
            for record, state, resumable in loop:
                run.folder.append(record, run.pool.timings.pop(record.index, {}))
                records.append(record)
                screen.show(record, state)
                if len(records) % run.config.search.checkpoint_every == 0:
                    run.folder.write_checkpoint(resumable, state)
        finally:
            run.folder.write_checkpoint(resumable, state)
            if state.best:
                run.folder.write_best(state.best, run.provenance())
    return state


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            raise FolderError(
                f"the run's {name} had fingerprint {before.get(name)} and has {now[name]} here: "
                "resume with what it began with, or start a new run"
            )
