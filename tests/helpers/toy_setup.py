"""Experiments small enough for a test, evaluators on them, and what a search asks of a pool."""

from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console

from prunevolve.configs import schema
from prunevolve.configs.schema import ROLES
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.search.evaluator import Evaluator
from prunevolve.search.experiment import Experiment, resolve
from prunevolve.search.pool.pool import Pool
from prunevolve.search.pool.worker import Job
from prunevolve.search.pool.workers import Backend
from prunevolve.search.records import Candidate, Outcome
from prunevolve.search.scale import scale_of, wanted_of


def criterion_of(text: str, group: str = "row") -> Criterion:
    """Return a criterion, also of a metric that cannot rank weights."""
    return Criterion(Metric.parse(text), group)


MAGNITUDE = criterion_of("W")
NEGATIVE = criterion_of("neg(W)")
CONSTANT = criterion_of("sub(W, W)")
WANDA = criterion_of("mul(W, sqrt(X))")
SNIP = criterion_of("mul(W, G)", "model")


def small(windows: int, length: int = 32) -> list[str]:
    """Return overrides for so many windows of each text."""
    return [
        f"{role}.{k}={n}" for role in ROLES for k, n in (("windows", windows), ("length", length))
    ]


@cache
def embedded_setup(*overrides: str, terminals: str = "XG", device: str = "cpu") -> Experiment:
    """Return an experiment on the embedded model at 50%, on two windows of each text."""
    plain = ("search.stages=[]", "pruning.sparsity=0.5")
    config = schema.load(None, [*small(2), *plain, *overrides])
    experiment = resolve(config).read_texts()
    return replace(experiment, terminals=frozenset(terminals), device=device)


def made_of(experiment: Experiment) -> Evaluator:
    """Return an evaluator that has collected its statistics and uses them, and has its scale."""
    evaluator = Evaluator(experiment)
    for subject, resident in enumerate(evaluator.residents):
        resident.use_statistics(evaluator.collect_statistics(subject))
    wanted = wanted_of(experiment, "fitness")
    evaluator.scale = scale_of(experiment, "fitness", {x: evaluator.losses(*x) for x in wanted})
    return evaluator


def quiet_pool(backend: Backend, experiment: Experiment, **more: Any) -> Pool:
    return Pool(backend, experiment, Console(quiet=True), **more)


def brief(pool: Pool, experiment: Experiment) -> None:
    """Collect statistics, measure the scale, and give both to all workers."""
    every = range(len(experiment.subjects))
    for subject, statistics in list(pool.tensors("collect_statistics", every)):
        pool.use_statistics(subject, statistics)
    known = pool.losses("scale", wanted_of(experiment, "fitness"))
    pool.use_scale(scale_of(experiment, "fitness", known))


def drive(pool: Pool, count: int, most_turns: int = 3000) -> dict[int, Job]:
    """Let a pool go on until so many candidates are done; return their jobs by index."""
    found: dict[int, Job] = {}
    for _ in range(most_turns):
        if job := pool.next_done():
            assert job.candidate.index not in found
            found[job.candidate.index] = job
        if len(found) == count:
            return found
    raise AssertionError(f"only {sorted(found)} are done")


def jobs_of(pool: Pool, candidates: list[Candidate]) -> list[Job]:
    for candidate in candidates:
        pool.submit(candidate)
    found = drive(pool, len(candidates))
    return [found[candidate.index] for candidate in candidates]


def outcomes_of(pool: Pool, candidates: list[Candidate]) -> list[Outcome]:
    return [job.outcome for job in jobs_of(pool, candidates)]
