"""A search small enough for a test: its experiment, and its loop over any pool."""

import torch

from configs import schema
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fitness import Setup, Task
from search.pool.protocol import Arrival, Pool
from search.population import Candidate, Outcome, Record, State
from search.resident import Subject
from search.yardstick import scale_of

SIZES = [
    *("fitness.windows=4", "fitness.length=64", "calibration.windows=4", "calibration.length=64"),
    *("selection.windows=2", "selection.length=32", "report.windows=2", "report.length=32"),
    *("search.population=8", "search.stages=[2]", "search.lag=4", "search.candidates=16"),
]


def small_experiment(*overrides: str) -> Experiment:
    """Return an experiment on the embedded model, of seconds."""
    return resolve(schema.load(None, [*SIZES, *overrides])).read_texts()


def records_of(pool: Pool, experiment: Experiment) -> list[Record]:
    """Run the search to its end; texts are known by themselves, without fingerprints."""
    brief(pool, experiment.setup)
    evolution = Evolution(experiment.settings, None, State())
    records = []
    while not evolution.done:
        for candidate in evolution.ask():
            if candidate.decided:
                records += evolution.tell(candidate.index, candidate.decided)
            else:
                pool.submit(candidate)
        if not evolution.done and (arrival := pool.next_outcome()):
            records += evolution.tell(arrival.index, arrival.outcome)
    return records


def brief(pool: Pool, setup: Setup) -> None:
    """Collect statistics, measure the scale, and give both to all workers."""
    for subject in range(len(setup.subjects)):
        pool.use_statistics(subject, pool.collect_statistics(subject))
    pool.use_scale(scale_of(setup, "mean", pool.losses))


def arrivals_of(pool: Pool, candidates: list[Candidate], most_turns: int = 2000) -> list[Arrival]:
    """Evaluate candidates 0, 1, ...; return what arrives, in their order."""
    for candidate in candidates:
        pool.submit(candidate)
    found: dict[int, Arrival] = {}
    for _ in range(most_turns):
        if arrival := pool.next_outcome():
            assert arrival.index not in found
            found[arrival.index] = arrival
        if len(found) == len(candidates):
            return [found[candidate.index] for candidate in candidates]
    raise AssertionError(f"only {sorted(found)} arrived")


def outcomes_of(pool: Pool, candidates: list[Candidate]) -> list[Outcome]:
    """As `arrivals_of`, the outcomes alone."""
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
        objective="nll",
        device="cpu",
        threads=1,
        stages=(),
        slack=0.1,
        hopeless=100.0,
    )
