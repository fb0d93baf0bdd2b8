"""Workers that measure nothing: they derive outcomes from the candidate's text after some time.

Everything else is real: the models, the statistics, the probe, the pool and the search. Workers in
this process use a clock that counts the driver's CPU seconds and skips waiting, so that figures do
not depend on other load on the machine, and waiting costs nothing.
"""

import hashlib
import heapq
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from torch import Tensor

from configs import schema
from pruning.progress import Progress
from search import launch
from search.experiment import Experiment
from search.fitness import Evaluator
from search.journal import RunFolder
from search.pool.crew import Call, Crew, Event, Reply, Started, perform
from search.pool.worker_pool import WorkerPool
from search.population import Candidate, Outcome
from search.prepare import prepare

LOWEST, SPREAD = 3.0, 2.0
"""Range of the made-up fitness in nats per token, as on the embedded model."""


def outcome_of(candidate: Candidate, tasks: int = 1) -> Outcome:
    """Return an outcome that depends on the candidate alone: evaluated, or stopped."""
    digest = hashlib.sha256(str(candidate.criterion).encode()).digest()
    fitness = LOWEST + SPREAD * int.from_bytes(digest[:6]) / 2**48
    limit, rises = candidate.stop_above, (fitness / LOWEST,) * tasks
    if limit is not None and fitness > limit:
        reason = f"rise {fitness:.4f} above {limit:.4f}"
        return Outcome("stopped", None, 512, reason, rises=rises)
    return Outcome("evaluated", fitness, 8192, rises=rises)


class TimeIsUp(Exception):
    """A search has run for the time to be measured."""


WARM = 0.2
"""Least share of a measurement's time that counts as warm-up."""


@dataclass
class Log:
    """What a crew did, by some clock.

    Attributes:
        workers: Number of workers.
        limit: Seconds after which a search ends.
        spans: Start and end of each worker's evaluations, in order.
        doing: Start of each worker's current evaluation, if its end is not known yet.
        began: Start of the first evaluation, and this process's CPU seconds at that time.
        stopped: When the time was up.
    """

    workers: int
    limit: float = math.inf
    spans: defaultdict[int, list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    doing: dict[int, float] = field(default_factory=dict)
    began: tuple[float, float] | None = None
    stopped: float = math.inf

    def check(self, now: float) -> None:
        """Record the time of the first call; raises TimeIsUp when the limit has passed."""
        self.began = self.began or (now, time.process_time())
        if now - self.began[0] > self.limit:
            self.stopped = now
            for worker, began in self.doing.items():
                self.spans[worker].append((began, now))
            raise TimeIsUp

    def add(self, worker: int, began: float, ended: float) -> None:
        """Record an evaluation."""
        self.doing.pop(worker, None)
        self.spans[worker].append((began, ended))

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process since the first evaluation began, whatever the clock."""
        assert self.began
        return time.process_time() - self.began[1]

    @property
    def evaluations(self) -> int:
        """Number of evaluations."""
        return sum(map(len, self.spans.values()))

    @property
    def busy_fraction(self) -> float:
        """Busy share of all workers' time after the warm-up."""
        warm = self._warm
        busy = sum(
            max(0.0, min(ended, self.stopped) - max(began, warm))
            for spans in self.spans.values()
            for began, ended in spans
        )
        return busy / (self.workers * (self.stopped - warm))

    @property
    def _warm(self) -> float:
        """End of the warm-up: all workers have had work; one that never had any counts as idle."""
        assert self.began
        warm = self.began[0] + WARM * self.limit
        starts = [spans[0][0] for spans in self.spans.values()]
        return max(warm, *starts) if len(starts) == self.workers else warm

    @property
    def gaps(self) -> list[float]:
        """Seconds between a worker's consecutive evaluations, ascending."""
        return sorted(
            after[0] - before[1]
            for spans in self.spans.values()
            for before, after in pairwise(spans)
        )


class DummyCrew:
    """A `Crew` in this process whose workers run in parallel by the driver's clock.

    Args:
        evaluator: Handles every call except `evaluate`, for all workers.
        workers: Number of workers.
        seconds: Returns how long a candidate's evaluation takes.
        limit: Seconds after which a search ends.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        workers: int,
        seconds: Callable[[Candidate], float],
        limit: float = math.inf,
    ) -> None:
        self.log = Log(workers, limit)
        self._evaluator, self._workers, self._seconds = evaluator, workers, seconds
        self._hired = 0
        self._ready: list[Event] = []
        self._due: list[tuple[float, int, Candidate]] = []
        self._skipped = 0.0

    def room(self) -> int:
        """Return how many more workers can be hired."""
        return self._workers - self._hired

    def hire(self) -> int:
        """Start a worker, which is ready at once."""
        self._hired += 1
        self._ready.append(Started(self._hired, self._evaluator.digests, self._evaluator.seconds))
        return self._hired

    def watch(self, progress: Progress) -> None:
        """Ignore the progress, which a benchmark does not show."""

    def give(self, worker: int, call: Call) -> None:
        """Begin an evaluation, or carry out any other call at once."""
        if call.method == "use_statistics" and worker > 1:
            self._ready.append(Reply(worker, None, {}))  # all workers share one evaluator
            return
        if call.method != "evaluate":
            self._ready.append(
                Reply(worker, *perform(self._evaluator, call.method, call.arguments))
            )
            return
        (candidate,) = call.arguments
        assert isinstance(candidate, Candidate)
        now = self.clock()
        self.log.check(now)
        due = now + self._seconds(candidate)
        heapq.heappush(self._due, (due, worker, candidate))
        self.log.add(worker, now, due)

    def dismiss(self, worker: int) -> None:
        """Fail, since these workers have no faults."""
        raise AssertionError(f"worker {worker} was dismissed")

    def events(self, seconds: float) -> Sequence[Event]:
        """Return the events, after waiting at most `seconds` for the first."""
        events, self._ready = self._ready, []
        now = self.clock()
        if not events:
            wake = min(now + seconds, self._due[0][0]) if self._due else now + seconds
            self._skipped += max(0.0, wake - now)
            now = max(now, wake)
        while self._due and self._due[0][0] <= now:
            _, worker, candidate = heapq.heappop(self._due)
            outcome = outcome_of(candidate, len(self._evaluator.setup.tasks))
            events.append(Reply(worker, outcome, {"seconds": 0.0}))
        return events

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Return the tensors themselves."""
        return tensors

    def wish(self, workers: int) -> None:
        """Ignore the wish, since the crew cannot grow."""

    def clock(self) -> float:
        """Return the CPU seconds of this process plus the skipped waiting."""
        return time.process_time() + self._skipped


def search_with(
    crew: Crew,
    experiment: Experiment,
    folder: RunFolder,
    workers: int,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run a search in a run folder as `run_search.py` does, until it ends or time is up."""
    console = Console(quiet=True)
    settings = experiment.config.ray
    limits = settings.wait_seconds, settings.start_seconds
    pool = WorkerPool(crew, experiment.setup, workers, *limits, clock)
    marks = prepare(folder, experiment, pool, console)
    with suppress(TimeIsUp):
        launch.evolve(folder, experiment, pool, marks, folder.read_records(), console)


@contextmanager
def run_folder(path: Path, experiment: Experiment) -> Iterator[RunFolder]:
    """Make a run folder as `run_search.py` does, and unlock it at the end."""
    folder = RunFolder.create(path)
    try:
        folder.write_text("config.yaml", schema.to_yaml(experiment.config))
        yield folder
    finally:
        folder.close()
