"""A setup small enough for a test, and what a search asks of a pool."""

import torch

from search.baseline_losses import scale_of
from search.fitness import Setup, Task
from search.pool.pool import Arrival, Pool
from search.pool.requests import CollectStatistics, UseScale, UseStatistics
from search.population import Candidate, Outcome
from search.resident import Subject


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
    roles = ("calibration", "fitness", "selection", "report")
    return Setup(
        subjects=(Subject("embedded", "float32"),),
        windows=(dict.fromkeys(roles, tokens),),
        tasks=(Task("half", 0, 0.5, None, 1.0),),
        leaves=frozenset("XG"),
        device="cpu",
        threads=1,
        stages=(),
    )
