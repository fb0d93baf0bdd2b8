"""Setups small enough for a test, evaluators on them, and what a search asks of a pool."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunevolve.evaluation.windows import Text
from prunevolve.pruning.masks import NOfM
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.models import load_tokenizer
from prunevolve.search.evaluator import Evaluator, Setup, Task
from prunevolve.search.pool.pool import Arrival, Pool
from prunevolve.search.pool.requests import CollectStatistics, UseScale, UseStatistics
from prunevolve.search.population import Candidate, Outcome
from prunevolve.search.prepare import Ask, scale_of
from prunevolve.search.resident import Subject
from prunevolve.search.scale import Scale

ROLES = ("calibration", "fitness", "selection", "report")
HALF = Task("half", 0, 0.5, None, 1.0)
TWO_OF_FOUR = Task("2:4", 0, 0.5, NOfM(2, 4), 3.0)


def criterion_of(text: str, group: str = "row") -> Criterion:
    """Return a criterion, also of a metric that cannot rank weights."""
    return Criterion(Metric.parse(text), group)


MAGNITUDE = criterion_of("W")
NEGATIVE = criterion_of("neg(W)")
CONSTANT = criterion_of("sub(W, W)")
WANDA = criterion_of("mul(W, sqrt(X))")
SNIP = criterion_of("mul(W, G)", "model")


def words(windows: int) -> dict[str, Tensor]:
    """Return windows of the embedded texts by role, of 32 tokens each."""
    tokenizer = load_tokenizer("embedded")
    return {role: Text("embedded", role, windows, 32).cut(tokenizer).tokens for role in ROLES}


def setup_of(**changes: Any) -> Setup:
    """Return a setup of four windows of each text; any of its fields may be given."""
    return replace(embedded_setup(), **({"windows": (words(4),)} | changes))


def made_of(setup: Setup) -> Evaluator:
    """Return an evaluator that has collected its statistics and uses them, and has its scale."""
    evaluator = Evaluator(setup)
    for subject in range(len(setup.subjects)):
        evaluator.use_statistics(subject, evaluator.collect_statistics(subject))
    measure_scale(evaluator)
    return evaluator


def asking(evaluator: Evaluator) -> Ask:
    """What a pool answers, from one evaluator."""
    return lambda requests: [evaluator.losses(r.task, r.role, r.criterion) for r in requests]


def measure_scale(evaluator: Evaluator) -> Scale:
    """Let an evaluator measure its own scale and use it; also return it."""
    scale = scale_of(evaluator.setup, asking(evaluator))
    evaluator.use_scale(scale)
    return scale


def brief(pool: Pool, setup: Setup) -> None:
    """Collect statistics, measure the scale, and give both to all workers."""
    for subject in range(len(setup.subjects)):
        (statistics,) = pool.ask([CollectStatistics(subject)])
        pool.prepare(UseStatistics(subject, statistics))
    pool.prepare(UseScale(scale_of(setup, pool.ask)))


def drive(pool: Pool, count: int, most_turns: int = 3000) -> dict[int, Arrival]:
    """Let a pool go on until so many outcomes arrived; return them by candidate."""
    found: dict[int, Arrival] = {}
    for _ in range(most_turns):
        if arrival := pool.next_outcome():
            assert arrival.index not in found
            found[arrival.index] = arrival
        if len(found) == count:
            return found
    raise AssertionError(f"only {sorted(found)} arrived")


def arrivals_of(pool: Pool, candidates: list[Candidate]) -> list[Arrival]:
    """Evaluate candidates; return what arrives, in their order."""
    for candidate in candidates:
        pool.submit(candidate)
    found = drive(pool, len(candidates))
    return [found[candidate.index] for candidate in candidates]


def outcomes_of(pool: Pool, candidates: list[Candidate]) -> list[Outcome]:
    return [arrival.outcome for arrival in arrivals_of(pool, candidates)]


def embedded_setup(windows: int = 2, length: int = 32) -> Setup:
    """Return what builds a worker with one task on the embedded model."""
    tokens = torch.arange(3, 3 + windows * length).reshape(windows, length)
    return Setup(
        subjects=(Subject("embedded", "float32"),),
        windows=(dict.fromkeys(ROLES, tokens),),
        tasks=(HALF,),
        leaves=frozenset("XG"),
        device="cpu",
        threads=1,
        stages=(),
    )
