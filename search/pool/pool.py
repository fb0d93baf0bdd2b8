"""The pool: what a search asks of its workers, wherever they are."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from prunevolve.command_line import check_interrupt
from prunevolve.pruning.parse import named_metric
from prunevolve.search.experiment import Experiment
from prunevolve.search.pool.jobs import Arrival, Jobs
from prunevolve.search.pool.worker import Call
from prunevolve.search.pool.workers import Backend, Workers
from prunevolve.search.records import Candidate, Losses, Wanted
from prunevolve.search.scale import Scale

_BACKWARD = 6
"""The cost of collecting statistics per token, in forward passes: an upper bound."""

_STEP_SECONDS = 0.5


class Pool:
    """Workers that hold the models of a search and evaluate its candidates.

    Args:
        backend: Where they live.
        experiment: What they are built from.
        clock: Seconds since any fixed time.
        say: Called with a line to show to the user.
        known: Losses that were measured before, which are not measured again.
        keep: Called with any others as soon as they are measured.

    Attributes:
        workers: The workers, and their faults.
    """

    def __init__(
        self,
        backend: Backend,
        experiment: Experiment,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
        known: Mapping[Wanted, Losses] | None = None,
        keep: Callable[[Wanted, Losses], object] = lambda wanted, losses: None,
    ) -> None:
        self._backend, self._experiment = backend, experiment
        self._losses, self._keep = dict(known or {}), keep
        self._count: Callable[[], object] = lambda: None
        self._jobs = Jobs(self._evaluation(Candidate(-1, named_metric("wanda"))))
        self._jobs.take = self._take
        self.workers = Workers(backend, self._jobs, experiment.config.ray, clock, say)

    def submit(self, candidate: Candidate) -> None:
        """Queue a candidate without waiting; an idle worker gets it at once."""
        self._jobs.add(self._evaluation(candidate), candidate)
        self.workers.assign()

    def next_outcome(self) -> Arrival | None:
        """Return a candidate's outcome, or None if none arrives in half a second.

        Raises:
            PoolError: If there is no worker and none comes, or no worker functions.
        """
        arrivals = self._jobs.arrivals
        self._turn(0.0 if arrivals else _STEP_SECONDS)
        return arrivals.popleft() if arrivals else None

    def losses(self, wanted: Sequence[Wanted]) -> list[Losses]:
        """Return the losses of all that is wanted; what is known is not measured again.

        Raises:
            ValueError: If a value is wrong; one line.
            CallError: If a call failed for a reason of its own.
            PoolError: As in `next_outcome`.
        """
        subject_of = self._experiment.subject_of
        new = [one for one in dict.fromkeys(wanted) if one not in self._losses]
        for _ in range(len(wanted) - len(new)):
            self._count()
        self._results(Call("losses", one, self._cost(subject_of[one[0]], one[1])) for one in new)
        return [self._losses[one] for one in wanted]

    def collect_statistics(self, subject: int) -> dict[str, Tensor]:
        """Return a model's statistics, by `X/layer`; raises as `losses` does."""
        cost = _BACKWARD * self._cost(subject, "calibration")
        (found,) = self._results([Call("collect_statistics", (subject,), cost)])
        return cast("dict[str, Tensor]", found)

    def probe_tensors(self, subject: int) -> dict[str, Tensor]:
        """Return the fingerprint's probe of a model; raises as `losses` does."""
        (found,) = self._results([Call("probe_tensors", (subject,))])
        return cast("dict[str, Tensor]", found)

    def use_statistics(self, subject: int, tensors: Mapping[str, Tensor]) -> None:
        """Let all workers use a model's statistics from now on."""
        self.workers.shared["use_statistics", subject] = self._backend.share(tensors)

    def use_scale(self, scale: Scale) -> None:
        """Let all workers measure candidates on this scale from now on."""
        self.workers.shared["use_scale",] = self._backend.share(scale)

    @contextmanager
    def counting(self, count: Callable[[], object]) -> Iterator[None]:
        """Call a function for each of what `losses` returns inside the context."""
        before, self._count = self._count, count
        try:
            yield
        finally:
            self._count = before

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of those dense weights of the models that get pruned; waits for a worker."""
        while self.workers.loaded is None:
            self._turn(_STEP_SECONDS)
        return self.workers.loaded.digests

    def _results(self, calls: Iterable[Call]) -> list[object]:
        jobs = [self._jobs.add(call) for call in calls]
        while not all(job.done for job in jobs):
            self._turn(_STEP_SECONDS)
        return [job.result for job in jobs]

    def _take(self, call: Call, result: object) -> None:
        """Keep losses as soon as they arrive."""
        if call.method == "losses":
            wanted, losses = cast("Wanted", call.arguments), cast("Losses", result)
            self._losses[wanted] = losses
            self._keep(wanted, losses)
        self._count()

    def _evaluation(self, candidate: Candidate) -> Call:
        return Call("evaluate", (candidate,), float(len(self._experiment.tasks)))

    def _turn(self, seconds: float) -> None:
        check_interrupt()
        self.workers.turn(seconds)

    def _cost(self, subject: int, role: str) -> float:
        """Return how long a text takes, in times of all fitness texts on the dense models."""
        subjects = self._experiment.subjects
        all_tokens = sum(one.tokens["fitness"].numel() for one in subjects)
        return subjects[subject].tokens[role].numel() / all_tokens
