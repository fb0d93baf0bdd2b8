"""A search small enough for a test: its experiment, and its loop over any pool."""

import torch

from configs import schema
from pruning.criterion import Criterion
from search.baseline_losses import scale_of
from search.evolution import Evolution
from search.experiment import Experiment, resolve
from search.fingerprint import Sketch
from search.fitness import Setup, Task
from search.pool.pool import Arrival, Pool
from search.pool.requests import CollectStatistics, UseScale, UseStatistics
from search.population import Candidate, Outcome, Record, State
from search.resident import Subject

SIZES = [
    *("fitness.windows=4", "fitness.length=64", "calibration.windows=4", "calibration.length=64"),
    *("selection.windows=2", "selection.length=32", "report.windows=2", "report.length=32"),
    *("search.population=8", "search.stages=[2]", "search.lag=4", "search.candidates=16"),
    "search.brood=1",
]


def small_experiment(*overrides: str) -> Experiment:
    """Return an experiment on the embedded model, of seconds."""
    return resolve(schema.load(None, [*SIZES, *overrides])).read_texts()


class Texts:
    """Marks by which every text has a mask of its own."""

    def fingerprint(self, criterion: Criterion) -> str:
        return criterion.text

    def distance(self, one: Criterion, other: Criterion) -> float:
        return 1.0

    def sketch(self, criterion: Criterion) -> Sketch:
        raise AssertionError("there are no broods")


def records_of(pool: Pool, experiment: Experiment) -> list[Record]:
    """Run the search to its end."""
    brief(pool, experiment.setup)
    evolution = Evolution(experiment.breeder, experiment.weights, Texts(), State())
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
        (statistics,) = pool.ask([CollectStatistics(subject)])
        pool.prepare(UseStatistics(subject, statistics))
    pool.prepare(UseScale(scale_of(setup, pool.ask)))


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
        device="cpu",
        threads=1,
        stages=(),
    )
