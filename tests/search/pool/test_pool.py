"""The pool's policy, against a backend that follows a script: every fault, and who is blamed."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

import pytest
from toy_setup import drive, embedded_setup

from prunevolve.pruning.metric import Criterion
from prunevolve.search.pool.pool import (
    FACTOR,
    GRACE,
    MOST,
    MOST_STARTS,
    MOST_SUSPECTS,
    CallError,
    Pool,
    PoolError,
)
from prunevolve.search.pool.requests import (
    CollectStatistics,
    Ended,
    Evaluate,
    Fault,
    ProbeTensors,
    Reply,
    Started,
    UseStatistics,
    WindowLosses,
)
from prunevolve.search.population import Candidate, Outcome

HANG = object()
LOST = Fault("lost", "its process or its node was lost")
CROWDED = Fault("crowded", "Ray ended it: its node lacked memory")
EXHAUSTED = Fault("exhausted", "OutOfMemoryError: out of memory")
REFUSED = Fault("refused", "ValueError: model 'm' cannot be loaded")
BASELINE, WAIT, START = -1, 300.0, 600.0


@dataclass
class ScriptedBackend:
    """A backend with room for `places` workers, which do and start with what a test says."""

    places: int = 2
    seconds: float = 1000.0
    does: object = lambda worker, request: Outcome("evaluated", 1.0)
    starts: object = lambda worker: "the model"
    takes: float = 0.1
    given: list = field(default_factory=list)
    hired: int = 0
    staff: set = field(default_factory=set)
    dismissed: list = field(default_factory=list)
    given_at: dict = field(default_factory=dict)
    ended_at: dict = field(default_factory=dict)
    coming: deque = field(default_factory=deque)

    def hire(self, most):
        return [self._hire() for _ in range(min(most, self.places - len(self.staff)))]

    def _hire(self):
        self.hired += 1
        self.staff.add(self.hired)
        start = self.starts(self.hired)
        if isinstance(start, Fault):
            self.end(self.hired, start)
        elif start is not HANG:
            self.coming.append(Started(self.hired, (start,), 0.05))
        return self.hired

    def give(self, worker, request):
        assert worker in self.staff
        self.given.append((worker, request))
        self.given_at[worker] = self.seconds
        came = self.does(worker, request)
        if isinstance(came, Fault) and came.kind in ("lost", "crowded"):
            self.end(worker, came)
        elif came is not HANG:
            self.coming.append(Reply(worker, came, {"seconds": self.takes}))

    def dismiss(self, worker):
        self.dismissed.append(worker)
        self.ended_at[worker] = self.seconds
        self.staff.discard(worker)
        self.coming = deque(event for event in self.coming if event.worker != worker)

    def events(self, seconds):
        self.seconds += self.takes if self.coming else seconds
        events = list(self.coming)
        self.coming.clear()
        return events

    def share(self, request):
        return request

    def end(self, worker, fault):
        self.staff.discard(worker)
        self.coming.append(Ended(worker, fault))

    @property
    def evaluated(self):
        """The indices of the candidates that were given, in order."""
        return [r.candidate.index for _, r in self.given if isinstance(r, Evaluate)]

    def tries(self, index):
        """Return the workers that a candidate was given to."""
        evaluations = [(w, r) for w, r in self.given if isinstance(r, Evaluate)]
        return [worker for worker, request in evaluations if request.candidate.index == index]


@pytest.fixture
def backend():
    return ScriptedBackend()


def pool_of(backend, workers=None):
    return Pool(backend, embedded_setup(), workers, WAIT, START, lambda: backend.seconds)


def submit(pool, *indices):
    for index in indices:
        pool.submit(Candidate(index, Criterion.parse("mul(W, X)", "row")))


def ready_pool(backend, workers=None):
    pool = pool_of(backend, workers)
    assert pool.digests
    for _ in range(3):
        pool.next_outcome()
    backend.given.clear()
    return pool


def turns(pool, count):
    return [arrival for _ in range(count) if (arrival := pool.next_outcome())]


def faulty(fault, bad, times=10**6):
    """Return what workers do if some candidates come to a fault, so many times each."""
    left = defaultdict(lambda: times)

    def does(worker, request):
        index = request.candidate.index if isinstance(request, Evaluate) else None
        if index in bad and left[index] > 0:
            left[index] -= 1
            return fault
        return Outcome("evaluated", 1.0)

    return does


def test_pool_returns_one_outcome_for_every_candidate_in_order(backend):
    pool = ready_pool(backend)
    submit(pool, *range(5))
    found = drive(pool, 5)
    assert {arrival.outcome.kind for arrival in found.values()} == {"evaluated"}
    assert found[0].timing == {"seconds": 0.1, "worker": 1}
    assert backend.evaluated == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("lost", LOST), ("crowded", CROWDED), ("exhausted", EXHAUSTED), ("late", HANG)],
)
def test_fault_that_passes_changes_no_outcome(backend, kind, fault):
    most = MOST[kind]
    backend.does = faulty(fault, {0}, times=most - 1)
    pool = ready_pool(backend)
    submit(pool, 0, 1, 2)
    assert {a.outcome.kind for a in drive(pool, 3).values()} == {"evaluated"}
    workers = backend.tries(0)
    assert len(workers) == len(set(workers)) == most  # a fresh worker each time
    assert pool.staff.faults == {kind: most - 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (LOST, f"ended every worker that it was given to, {{0}} of {{0}}: {LOST.reason}"),
        (CROWDED, f"ended every worker that it was given to, {{0}} of {{0}}: {CROWDED.reason}"),
        (EXHAUSTED, "OutOfMemoryError: out of memory, {0} times"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_candidate_that_ends_every_worker_fails_with_the_reason(backend, fault, reason):
    backend.does = faulty(fault, {1})
    pool = ready_pool(backend)
    submit(pool, *range(4))
    found = drive(pool, 4)
    most = MOST[fault.kind]
    assert found[1].outcome == Outcome("failed", reason=reason.format(most))
    assert {found[index].outcome.kind for index in (0, 2, 3)} == {"evaluated"}
    assert len(backend.tries(1)) == most


def test_suspects_get_their_last_try_only_after_another_answer(backend):
    """While all are lost, none is blamed: those to whom it only happened are evaluated."""
    down = {"until": 10**9}
    backend.does = lambda *_: LOST if backend.hired < down["until"] else Outcome("evaluated", 1.0)
    pool = ready_pool(backend)
    submit(pool, 0, 1)
    while len(backend.tries(0)) < MOST["lost"] - 1 or len(backend.tries(1)) < MOST["lost"] - 1:
        assert pool.next_outcome() is None
    down["until"] = backend.hired + 3  # the outage ends while the baseline is evaluated
    assert {a.outcome.kind for a in drive(pool, 2).values()} == {"evaluated"}
    assert backend.tries(BASELINE)


@pytest.mark.parametrize("answer", [Outcome("evaluated", 1.0), Fault("error", "KeyError: 'X'")])
def test_suspect_that_is_alone_is_judged_by_a_baseline(backend, answer):
    alone = {0: EXHAUSTED, BASELINE: answer}
    backend.does = lambda worker, request: alone[request.candidate.index]
    pool = ready_pool(backend)
    submit(pool, 0)
    found = drive(pool, 1)
    assert list(found) == [0]  # the baseline is no candidate of the search
    assert found[0].outcome.kind == "failed"
    assert backend.evaluated == [0, 0, BASELINE, 0]


@pytest.mark.parametrize("fault", [LOST, CROWDED, EXHAUSTED, HANG])
@pytest.mark.parametrize("candidates", [2, 8])
def test_pool_where_nothing_can_be_evaluated_blames_no_candidate(backend, fault, candidates):
    backend.does = lambda worker, request: fault
    pool = ready_pool(backend)
    submit(pool, *range(candidates))
    arrivals = []
    with pytest.raises(PoolError, match=r"^no worker functions: .*$") as error:
        for _ in range(3000):
            arrivals += turns(pool, 1)
    assert "\n" not in str(error.value)
    assert arrivals == []
    assert len(backend.given) <= 2 * (MOST_SUSPECTS + 1) * 8


@pytest.mark.parametrize(("at_once", "blamed"), [(8, 0), (1, MOST_SUSPECTS - 1)])
def test_device_that_fails_all_but_the_baseline_ends_the_run(backend, at_once, blamed):
    """With one candidate at a time, only the baseline can tell, and it works."""
    backend.does = faulty(EXHAUSTED, set(range(100)))
    pool = ready_pool(backend)
    failed = []
    with pytest.raises(PoolError, match=f"{MOST_SUSPECTS} candidates in a row, the last of them"):
        for first in range(0, 100, at_once):
            submit(pool, *range(first, first + at_once))
            while len(failed) < first + at_once:
                failed += [arrival.index for arrival in turns(pool, 1)]
    assert failed == list(range(blamed))


def test_candidates_that_fail_between_others_never_end_the_run(backend):
    bad = set(range(0, 40, 2))
    backend.does = faulty(EXHAUSTED, bad)
    pool = ready_pool(backend)
    for index in range(40):
        submit(pool, index)
        drive(pool, 1)
    assert pool.staff.faults == {"exhausted": MOST["exhausted"] * len(bad)}


@pytest.mark.parametrize("kind", ["error", "refused"])
def test_error_of_a_candidate_fails_it_and_no_worker(backend, kind):
    fault = Fault(kind, "KeyError: 'layer'", "search/evaluator.py:120", "Traceback ...")
    backend.does = faulty(fault, {0})
    pool = ready_pool(backend)
    submit(pool, 0, 1)
    found = drive(pool, 2)
    reason = "KeyError: 'layer' at search/evaluator.py:120"
    assert found[0].outcome == Outcome("failed", reason=reason)
    assert found[0].trace == "Traceback ..."
    assert found[1].outcome.kind == "evaluated"
    assert (len(backend.tries(0)), backend.dismissed) == (1, [])
    assert pool.staff.faults == {kind: 1}


def test_candidate_that_hangs_every_worker_fails_after_longer_and_longer_waits(backend):
    backend.does = faulty(HANG, {0})
    pool = ready_pool(backend)
    submit(pool, *range(300))
    found = drive(pool, 300)
    reason = f"timeout: no answer in time, {MOST['late']} times"
    assert found[0].outcome == Outcome("failed", reason=reason)
    workers = backend.tries(0)
    waits = [backend.ended_at[worker] - backend.given_at[worker] for worker in workers]
    # Of the first nothing is known but how long the dense model took.
    allowed = [GRACE + FACTOR * 0.05, 2 * (GRACE + FACTOR * 0.1), 4 * (GRACE + FACTOR * 0.1)]
    assert backend.dismissed == workers
    assert len(workers) == MOST["late"]
    assert all(a < wait < a + 1 for wait, a in zip(waits, allowed, strict=True)), waits


def test_suspended_driver_finds_nobody_late_and_takes_what_came_meanwhile(backend):
    backend.does = faulty(HANG, {0})
    pool = ready_pool(backend)
    submit(pool, 0)
    backend.seconds += 86400
    assert turns(pool, 5) == []
    submit(pool, 1)
    backend.takes = 86400.0
    assert drive(pool, 1)[1].outcome.kind == "evaluated"
    assert backend.dismissed == []


def test_work_starts_with_the_first_worker_that_is_ready(backend):
    backend.places = 3
    backend.starts = lambda worker: "the model" if worker == 2 else HANG
    pool = pool_of(backend)
    submit(pool, 0)
    drive(pool, 1)
    assert backend.tries(0) == [2]
    backend.does = lambda worker, request: HANG
    submit(pool, 1)
    staff = pool.staff
    assert (staff.ready, staff.busy, staff.starting) == (1, 1, 2)
    assert (staff.faults, staff.trouble) == ({}, "")


def test_node_that_refuses_does_not_end_what_another_can_do(backend):
    backend.starts = lambda worker: REFUSED if worker % 2 else "the model"
    pool = pool_of(backend)
    submit(pool, 0)
    assert drive(pool, 1)[0].outcome.kind == "evaluated"
    assert backend.tries(0) == [2]


def test_workers_that_cannot_start_again_end_the_run_with_the_reason(backend):
    pool = ready_pool(backend)
    backend.starts = lambda worker: REFUSED
    backend.does = lambda worker, request: LOST
    submit(pool, 0, 1)
    with pytest.raises(PoolError, match=r"no worker could be started, .*model 'm' cannot be") as e:
        turns(pool, 1000)
    assert "\n" not in str(e.value)
    assert len(backend.tries(0)) == 1  # to a worker that was there
    assert backend.hired <= 2 + 2 * MOST_STARTS


def test_failed_starts_elsewhere_do_not_end_a_run_whose_only_worker_is_lost(backend):
    backend.starts = lambda worker: REFUSED if worker > 1 else "the model"
    pool = pool_of(backend)
    assert pool.digests
    turns(pool, 100)
    assert backend.hired > 1 + MOST_STARTS
    backend.starts = lambda worker: "the model"
    backend.does = faulty(LOST, {0}, times=1)
    submit(pool, 0)
    assert drive(pool, 1)[0].outcome.kind == "evaluated"


def test_worker_that_never_starts_is_given_up_after_its_time(backend):
    backend.starts = lambda worker: HANG
    pool = pool_of(backend)
    before = backend.seconds
    with pytest.raises(PoolError, match=r"no worker for 300 s .*: timeout: did not start in time"):
        assert pool.digests
    assert START <= backend.seconds - before < START + 2
    assert backend.dismissed == [1, 2]


def test_workers_lost_while_they_start_cost_no_try_and_are_not_waited_for_without_end(backend):
    backend.places = 3
    pool = ready_pool(backend)
    backend.starts = lambda worker: LOST
    backend.does = lambda worker, request: LOST
    submit(pool, 0)
    before = backend.seconds
    with pytest.raises(PoolError, match="no worker for 300 s"):
        turns(pool, 10000)
    assert WAIT < backend.seconds - before < WAIT + 70
    assert len(backend.tries(0)) == 3  # all that were ready
    assert backend.hired < 100  # with longer and longer breaks


def test_pool_without_room_waits_as_long_as_it_is_told_to(backend):
    backend.places = 0
    pool = pool_of(backend)
    before = backend.seconds
    with pytest.raises(PoolError, match=r"no worker for 300 s \(ray.wait_seconds\)$"):
        assert pool.digests
    assert WAIT < backend.seconds - before < WAIT + 2


def test_worker_with_another_model_is_refused_and_gets_nothing(backend):
    backend.starts = lambda worker: "another" if worker == 2 else "the model"
    pool = pool_of(backend)
    submit(pool, *range(5))
    drive(pool, 5)
    assert 2 in backend.dismissed
    assert 2 not in {worker for worker, _ in backend.given}
    assert "its models are not the run's" in pool.staff.trouble


@pytest.mark.parametrize(("workers", "ready"), [(None, 5), (3, 3)])
def test_pool_grows_with_the_room_up_to_what_is_asked_for(backend, workers, ready):
    pool = ready_pool(backend, workers)
    assert pool.staff.ready == 2
    backend.places = 5
    turns(pool, 20)
    assert (pool.staff.ready, backend.hired) == (ready, ready)


def test_worker_whose_node_lacked_memory_is_replaced_a_minute_later(backend):
    backend.does = faulty(CROWDED, {0}, times=1)
    pool = ready_pool(backend)
    submit(pool, 0)
    assert drive(pool, 1)[0].outcome.kind == "evaluated"
    for seconds, ready in ((50, 1), (15, 2)):
        turns(pool, 2 * seconds)
        assert pool.staff.ready == ready


def test_workers_have_all_statistics_before_any_job_late_ones_too(backend):
    pool = pool_of(backend)
    assert pool.digests
    statistics = [UseStatistics(subject, {}) for subject in range(2)]
    for request in statistics:
        pool.prepare(request)
    backend.places, backend.takes = 3, 1.0
    submit(pool, *range(30))
    drive(pool, 30)
    for worker in range(1, 4):
        requests = [request for other, request in backend.given if other == worker]
        assert requests[:2] == statistics
        assert {type(request) for request in requests[2:]} == {Evaluate}


@pytest.mark.parametrize("fault", [LOST, EXHAUSTED, Fault("error", "KeyError: 1", "x.py:1")])
def test_statistics_that_end_every_worker_end_the_run(backend, fault):
    pool = ready_pool(backend)
    backend.does = lambda worker, request: fault if isinstance(request, UseStatistics) else None
    pool.prepare(UseStatistics(0, {}))
    submit(pool, 0)
    with pytest.raises(PoolError, match=f"no worker.*{fault.reason}"):
        turns(pool, 10000)
    assert backend.tries(0) == []
    assert backend.hired < 100


@pytest.mark.parametrize("fault", [LOST, CROWDED, EXHAUSTED, HANG])
def test_requests_of_the_run_are_done_again_after_a_fault(backend, fault):
    seen, counted = [], []

    def does(worker, request):
        if request not in seen:
            seen.append(request)
            return fault
        return ("done", request)

    backend.does = does
    pool = ready_pool(backend)
    requests = [
        *(CollectStatistics(0), ProbeTensors(0)),
        *(WindowLosses(0, role, None) for role in ("report", "selection")),
    ]
    with pool.counting(lambda: counted.append(1)):
        done = pool.ask(requests)
    assert done == [("done", request) for request in requests]
    assert len(counted) == len(requests)


@pytest.mark.parametrize(
    ("fault", "error", "line"),
    [
        (Fault("refused", "ValueError: no text", "x:1", "t"), ValueError, "ValueError: no text"),
        (Fault("error", "KeyError: 'X'", "x.py:7", "t"), CallError, "KeyError: 'X' at x.py:7"),
    ],
)
def test_request_of_the_run_that_cannot_be_done_is_one_line(backend, fault, error, line):
    backend.does = lambda worker, request: fault
    pool = ready_pool(backend)
    with pytest.raises(error, match=f"^a worker failed in ProbeTensors: {line}$") as raised:
        pool.ask([ProbeTensors(0)])
    assert getattr(raised.value, "trace", "t") == "t"
