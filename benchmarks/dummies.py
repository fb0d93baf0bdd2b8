"""Workers that measure nothing: an outcome is made of the candidate's text, after a given time.

All else is real: the models, the statistics, the probe, the pool and the search that is driven.
Those in this process live by a clock that counts the CPU seconds of the driver and skips the
others, so that their figures do not depend on what else a machine does, and waiting costs nothing.
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
"""Of the made-up fitness, nats per token: what the embedded model's candidates come to."""


def outcome_of(candidate: Candidate) -> Outcome:
    """Return an outcome that depends on the candidate alone: evaluated, or stopped."""
    digest = hashlib.sha256(str(candidate.criterion).encode()).digest()
    fitness = LOWEST + SPREAD * int.from_bytes(digest[:6]) / 2**48
    limit = candidate.stop_above
    if limit is not None and fitness > limit:
        return Outcome("stopped", None, 512, f"rise {fitness:.4f} above {limit:.4f}")
    return Outcome("evaluated", fitness, 8192)


class TimeIsUp(Exception):
    """A search has gone on for as long as it was to be measured."""


WARM = 0.2
"""Share of a measurement's time, at least, that does not count."""


@dataclass
class Log:
    """What a crew did, by some clock.

    Attributes:
        workers: How many there are.
        limit: Seconds after which a search ends.
        spans: Of each worker's evaluations in order, when each began and when it ended.
        doing: When an evaluation began whose end is not known yet.
        began: When the first was given; the CPU seconds of this process by then.
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
        """Note the time of the first call; raises TimeIsUp when the limit has passed."""
        self.began = self.began or (now, time.process_time())
        if now - self.began[0] > self.limit:
            self.stopped = now
            for worker, began in self.doing.items():
                self.spans[worker].append((began, now))
            raise TimeIsUp

    def add(self, worker: int, began: float, ended: float) -> None:
        """Note an evaluation."""
        self.doing.pop(worker, None)
        self.spans[worker].append((began, ended))

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this process since the first evaluation was given, on any clock."""
        assert self.began
        return time.process_time() - self.began[1]

    @property
    def evaluations(self) -> int:
        """How many were given."""
        return sum(map(len, self.spans.values()))

    @property
    def busy_fraction(self) -> float:
        """The busy share of all workers' time, once warm."""
        begin = self._warm
        busy = sum(
            max(0.0, min(ended, self.stopped) - max(began, begin))
            for spans in self.spans.values()
            for began, ended in spans
        )
        return busy / (self.workers * (self.stopped - begin))

    @property
    def _warm(self) -> float:
        """When every worker had had work; early, if one never had: it counts as idle then."""
        assert self.began
        begin = self.began[0] + WARM * self.limit
        firsts = [spans[0][0] for spans in self.spans.values()]
        return max(begin, *firsts) if len(firsts) == self.workers else begin

    @property
    def gaps(self) -> list[float]:
        """Seconds from a worker's end to its next start, ascending."""
        return sorted(
            after[0] - before[1]
            for spans in self.spans.values()
            for before, after in pairwise(spans)
        )


class DummyCrew:
    """A `Crew` in this process whose workers are busy at the same time, by the driver's clock.

    Args:
        evaluator: Does all calls but `evaluate`, for all workers.
        workers: How many there are.
        seconds: How long each candidate's evaluation takes.
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
        """Return how many workers were not hired yet."""
        return self._workers - self._hired

    def hire(self) -> int:
        """Start a worker, at once."""
        self._hired += 1
        self._ready.append(Started(self._hired, self._evaluator.digests, self._evaluator.seconds))
        return self._hired

    def watch(self, progress: Progress) -> None:
        """Nobody watches a benchmark."""

    def give(self, worker: int, call: Call) -> None:
        """Begin an evaluation, or do another call at once."""
        if call.method == "use_statistics" and worker > 1:
            self._ready.append(Reply(worker, None, {}))  # they have one evaluator together
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
        """No worker of these has a reason to go."""
        raise AssertionError(f"worker {worker} was dismissed")

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what happened, waiting at most so long for the first of it."""
        events, self._ready = self._ready, []
        now = self.clock()
        if not events:
            wake = min(now + seconds, self._due[0][0]) if self._due else now + seconds
            self._skipped += max(0.0, wake - now)
            now = max(now, wake)
        while self._due and self._due[0][0] <= now:
            _, worker, candidate = heapq.heappop(self._due)
            events.append(Reply(worker, outcome_of(candidate), {"seconds": 0.0}))
        return events

    def share(self, tensors: Mapping[str, Tensor]) -> object:
        """Return the tensors themselves."""
        return tensors

    def wish(self, workers: int) -> None:
        """There is nothing to grow."""

    def clock(self) -> float:
        """Return CPU seconds of this process, and those that were skipped."""
        return time.process_time() + self._skipped


def search_with(
    crew: Crew,
    experiment: Experiment,
    folder: RunFolder,
    workers: int,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run a search in a run folder as `run_search.py` does, to the end of its loop or its time."""
    console = Console(quiet=True)
    where = experiment.config.ray
    limits = where.wait_seconds, where.start_seconds
    pool = WorkerPool(crew, experiment.setup, workers, *limits, clock)
    marks = prepare(folder, experiment, pool, console)
    with suppress(TimeIsUp):
        launch.evolve(folder, experiment, pool, marks, folder.read_records(), console)


@contextmanager
def run_folder(path: Path, experiment: Experiment) -> Iterator[RunFolder]:
    """Make a run folder as `run_search.py` does; unlocked at the end."""
    folder = RunFolder.create(path)
    try:
        folder.write_text("config.yaml", schema.to_yaml(experiment.config))
        yield folder
    finally:
        folder.close()
