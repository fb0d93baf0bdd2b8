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

from configs import schema
from configs.schema import Config
from pruning import models
from pruning.calibration import STATISTICS
from pruning.masks import parse_pattern
from pruning.operators import LEAF_SETS
from search.evolution import Settings, evolve, replay
from search.fingerprint import Probe, fingerprint, tensors_digest
from search.finish import finish
from search.fitness import Evaluator, InProcessPool, Setup
from search.journal import FolderError, RunFolder
from search.population import Record, State
from search.primitives import primitive_set
from search.report import write_report
from search.run import Run, environment
from search.screen import Screen
from search.texts import load_windows
from search.validation import seed_metric, validate
from search.variation import Variation

DONE, INTERRUPTED, NOTHING_EVALUATED = 0, 3, 5
"""Exit codes; 2 is a usage or config error and 4 a folder that does not fit."""

RESUMABLE_KEYS = ("search.candidates", "ray.")
"""What `--set` may change of a run that is there: how long and where, never what."""


def launch(config: Config, out: Path, console: Console) -> int:
    """Run a new search in an empty folder; returns the exit code."""
    validate(config)
    # Before the folder is made: a text that cannot be had must not leave a run behind.
    windows = load_windows(config, models.load_tokenizer(config.model))
    folder = RunFolder.create(out)
    try:
        folder.write_text("config.yaml", schema.to_yaml(config))
        return _run(folder, config, windows, console)
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
                "search.candidates and ray.* alone"
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
        windows = load_windows(config, models.load_tokenizer(config.model))
        folder.write_text("config.yaml", schema.to_yaml(config))
        return _run(folder, config, windows, console)
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


def settings_of(config: Config) -> Settings:
    """Return the loop's knobs from a config."""
    search = config.search
    return Settings(
        seed=search.seed,
        candidates=search.candidates,
        population=search.population,
        lag=search.lag,
        group=config.pruning.group,
        seeds=tuple(seed_metric(seed) for seed in search.seeds),
        pool=search.pool,
        parents=search.parents,
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


def _run(folder: RunFolder, config: Config, windows: dict[str, Any], console: Console) -> int:
    started = time.monotonic()
    console.print(f"run folder {folder.path}", soft_wrap=True)
    records = folder.read_records()
    try:
        with _pool(config, windows) as pool:
            # After Ray's start, which takes SIGTERM for itself and aborts. SIGINT too: a shell
            # starts its background jobs with it ignored.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _interrupt)
            texts = {role: window.provenance for role, window in windows.items()}
            run = Run(folder, config, texts, pool, console)
            state = _evolve(run, _prepare(run), records)
            if state.best is None:
                console.print(
                    "error: no candidate was evaluated to the end; breed more: "
                    f"run_search.py --resume {folder.path} --set search.candidates=N",
                    soft_wrap=True,
                )
                return NOTHING_EVALUATED
            finish(run, records, state, lambda: time.monotonic() - started)
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


@contextmanager
def _pool(config: Config, windows: dict[str, Any]) -> Iterator[Any]:
    """Open the pool that the config asks for; closed at the end, whatever happens."""
    search, where = config.search, config.ray
    setup = Setup(
        model=config.model,
        dtype=config.dtype,
        device="cuda" if where.gpus_per_worker else "cpu",
        threads=where.cpus_per_worker,
        windows={role: window.tokens for role, window in windows.items()},
        sparsity=config.pruning.sparsity,
        pattern=parse_pattern(config.pruning.pattern),
        stages=tuple(search.stages),
        slack=search.slack,
        hopeless=search.hopeless,
    )
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


def _prepare(run: Run) -> Probe:
    """Get statistics and probe, from the folder or from a worker, and check the environment.

    Raises:
        FolderError: If model, texts or statistics are not those that the run began with.
    """
    statistics = run.folder.read_tensors("statistics.safetensors")
    if statistics is None:
        leaves = _statistics_named(run.config)
        tokens = run.texts["calibration"]["tokens"]
        run.console.print(f"collecting {', '.join(sorted(leaves))} on {tokens} tokens")
        statistics = run.pool.call("collect_statistics", leaves)
        run.folder.write_tensors("statistics.safetensors", statistics)
    run.pool.share_statistics(statistics)
    fingerprints = {
        "model": run.pool.call("model_digest"),
        "texts": {role: text["text_sha256"] for role, text in run.texts.items()},
        "statistics": tensors_digest(statistics),
    }
    if (run.folder.path / "environment.json").exists():
        _check_same(run.folder.read_json("environment.json")["fingerprints"], fingerprints)
    else:
        run.folder.write_json("environment.json", environment(fingerprints))
    probe = run.folder.read_tensors("probe.safetensors")
    if probe is None:
        probe = run.pool.call("probe_tensors")
        run.folder.write_tensors("probe.safetensors", probe)
    return Probe.from_tensors(probe)


def _statistics_named(config: Config) -> frozenset[str]:
    """Return the statistics that candidates, seeds and baselines can name."""
    seeds = (seed_metric(seed).leaves for seed in config.search.seeds)
    return STATISTICS & frozenset(LEAF_SETS[config.search.primitives]).union(*seeds)


def _evolve(run: Run, probe: Probe, records: list[Record]) -> State:
    """Run the loop to its end; new records are appended to `records` as they are committed."""
    settings = settings_of(run.config)
    target = run.target()
    start = resumable = run.folder.read_checkpoint(max(0, len(records) - settings.lag))
    state = replay(settings, start, records)[len(records)]
    loop = evolve(
        settings, lambda metric: fingerprint(metric, target, probe), run.pool, start, records[:]
    )
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
