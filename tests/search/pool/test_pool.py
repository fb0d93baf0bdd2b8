"""The pool's policy, against a backend that follows a script: every fault, and who is blamed."""

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import pytest
from toy_records import record_of
from toy_setup import drive, embedded_setup, quiet_pool

from prunevolve.command_line import Resumable
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.search.descent import Step
from prunevolve.search.pool.pool import MOST_SUSPECTS, CallError
from prunevolve.search.pool.worker import Fault, Loaded
from prunevolve.search.pool.workers import FACTOR, GRACE, MAX_TRIES, MOST_STARTS
from prunevolve.search.progress import SHOWN, lines_of
from prunevolve.search.records import Candidate, Outcome

HANG = object()
LOST = Fault("lost", "its process or its node was lost")
CROWDED = Fault("no memory on node", "Ray killed it: its node lacked memory")
EXHAUSTED = Fault("out of memory", "OutOfMemoryError: out of memory")
RAISED = Fault("error", "KeyError: 'X'", "search/evaluator.py:120", "Traceback ...")
REFUSED = Fault("refused", "ValueError: model 'm' cannot be loaded")
FAULTS = {"lost": LOST, "no memory on node": CROWDED, "out of memory": EXHAUSTED, "timeout": HANG}
BASELINE, WAIT, START = -1, 300.0, 600.0


@dataclass
class ScriptedBackend:
    """A backend with room for `places` workers, which do and start with what a test says."""

    places: int = 2
    seconds: float = 1000.0
    does: object = lambda worker, job: Outcome("evaluated", 1.0)
    starts: object = lambda worker: "the model"
    takes: float = 0.1
    given: list = field(default_factory=list)
    started: int = 0
    waiting: list = field(default_factory=list)
    staff: set = field(default_factory=set)
    given_at: dict = field(default_factory=dict)
    stopped: dict = field(default_factory=dict)
    coming: deque = field(default_factory=deque)

    def room(self):
        return self.places

    def start(self, worker):
        self.started = worker

    def give(self, worker, job, shared):
        if job.method == "arrive":
            self.waiting.append(worker)
        elif job.method == "load":
            came = self.starts(worker)
            self.answer(worker, Loaded((came,), 0.05) if isinstance(came, str) else came)
        else:
            assert worker in self.staff
            self.given.append((worker, job))
            self.given_at[worker] = self.seconds
            self.answer(worker, self.does(worker, job))

    def answer(self, worker, came):
        if isinstance(came, Fault) and came.kind in ("lost", "no memory on node"):
            self.staff.discard(worker)
        if came is not HANG:
            self.coming.append((worker, came, {"seconds": self.takes}))

    def stop(self, worker):
        self.stopped[worker] = self.seconds
        self.staff.discard(worker)
        self.waiting = [other for other in self.waiting if other != worker]
        self.coming = deque(event for event in self.coming if event[0] != worker)

    def events(self, seconds):
        while self.waiting and len(self.staff) < self.places:
            worker = self.waiting.pop(0)
            self.staff.add(worker)
            self.coming.append((worker, None, {}))
        self.seconds += self.takes if self.coming else seconds
        events = list(self.coming)
        self.coming.clear()
        return events

    def share(self, value):
        return value

    @property
    def evaluations(self):
        return [(w, job.candidate.index) for w, job in self.given if job.method == "evaluating"]

    def tries(self, index):
        return [worker for worker, other in self.evaluations if other == index]

    def waited(self, worker):
        """Return for how long a worker had its latest job when it was stopped."""
        return self.stopped[worker] - self.given_at[worker]


@pytest.fixture
def backend():
    return ScriptedBackend()


def pool_of(backend, workers=None, **more):
    setup = embedded_setup(f"ray.workers={workers or 'null'}")
    return quiet_pool(backend, setup, clock=lambda: backend.seconds, **more)


def submit(pool, *indices):
    for index in indices:
        pool.submit(Candidate(index, Criterion.parse("mul(W, X)", "row")))


def ready_pool(backend, workers=None, **more):
    pool = pool_of(backend, workers, **more)
    pool.start()
    for _ in range(3):
        pool.next_done()
    return pool


@pytest.fixture
def pool(backend):
    return ready_pool(backend)


def done_of(pool, *indices):
    submit(pool, *indices)
    return drive(pool, len(indices))


def kinds_of(pool, *indices):
    done = done_of(pool, *indices)
    return [done[index].outcome.kind for index in indices]


def turns(pool, count):
    return [job for _ in range(count) if (job := pool.next_done())]


def faulty(fault, bad, times=10**6):
    left = defaultdict(lambda: times)

    def does(worker, job):
        index = job.candidate.index if job.method == "evaluating" else None
        if index in bad and left[index] > 0:
            left[index] -= 1
            return fault
        return Outcome("evaluated", 1.0)

    return does


@pytest.mark.parametrize(("kind", "fault"), FAULTS.items())
def test_fault_that_passes_changes_no_outcome(backend, pool, kind, fault):
    most = MAX_TRIES[kind]
    backend.does = faulty(fault, {0}, times=most - 1)
    assert kinds_of(pool, 0, 1, 2) == ["evaluated"] * 3
    workers = backend.tries(0)
    assert len(workers) == len(set(workers)) == most  # a fresh worker each time
    assert pool.workers.faults == {kind: most - 1}
    if fault is not HANG:  # one that ends every worker fails
        backend.does = faulty(fault, {4})
        found = done_of(pool, 3, 4, 5)
        assert found[4].outcome == Outcome("failed", reason=f"{fault.reason}, {most} times")
        assert {found[index].outcome.kind for index in (3, 5)} == {"evaluated"}
        assert len(backend.tries(4)) == most


def test_suspects_get_their_last_try_only_after_another_answer(backend, pool):
    """While all are lost, none is blamed: those to whom it only happened are evaluated."""
    down = {"until": 10**9}
    backend.does = lambda *_: LOST if backend.started < down["until"] else Outcome("evaluated", 1.0)
    submit(pool, 0, 1)
    while min(len(backend.tries(index)) for index in (0, 1)) < MAX_TRIES["lost"] - 1:
        assert pool.next_done() is None
    down["until"] = backend.started + 3  # the outage ends while the baseline is evaluated
    assert {job.outcome.kind for job in drive(pool, 2).values()} == {"evaluated"}
    assert backend.tries(BASELINE)


def test_suspect_that_is_alone_is_judged_by_a_baseline(backend, pool):
    alone = {0: EXHAUSTED, BASELINE: Outcome("evaluated", 1.0)}
    backend.does = lambda worker, job: alone[job.candidate.index]
    found = done_of(pool, 0)
    assert list(found) == [0]  # the baseline is no candidate of the search
    assert found[0].outcome.kind == "failed"
    assert [index for _, index in backend.evaluations] == [0, 0, BASELINE, 0]


@pytest.mark.parametrize("fault", [*FAULTS.values(), RAISED])
@pytest.mark.parametrize("candidates", [2, 8])
def test_pool_where_nothing_can_be_evaluated_blames_no_candidate(backend, pool, fault, candidates):
    backend.does = lambda worker, job: fault
    submit(pool, *range(candidates))
    done = []
    with pytest.raises(Resumable, match=r"^no worker functions: .*$") as error:
        for _ in range(3000):
            done += turns(pool, 1)
    assert "\n" not in str(error.value)
    assert done == []
    assert len(backend.given) <= 2 * (MOST_SUSPECTS + 1) * 8


@pytest.mark.parametrize("at_once", [8, 1])
def test_device_that_fails_all_but_the_baseline_ends_the_run(backend, pool, at_once):
    """Only the baseline can tell, and it works: until there are too many in a row."""
    backend.does = faulty(EXHAUSTED, set(range(100)))
    failed = []
    with pytest.raises(Resumable, match=f"{MOST_SUSPECTS} candidates in a row, the last of them: "):
        for first in range(0, 100, at_once):
            submit(pool, *range(first, first + at_once))
            while len(failed) < first + at_once:
                failed += turns(pool, 1)
    assert len(failed) < MOST_SUSPECTS


def test_candidates_that_fail_between_others_never_end_the_run(backend, pool):
    bad = set(range(0, 40, 2))
    backend.does = faulty(EXHAUSTED, bad)
    for index in range(40):
        kinds_of(pool, index)
    assert pool.workers.faults == {"out of memory": MAX_TRIES["out of memory"] * len(bad)}


def test_candidates_that_raise_in_a_row_fail_if_a_baseline_works(backend, pool):
    backend.does = faulty(RAISED, set(range(12)))
    assert kinds_of(pool, *range(13)) == ["failed"] * 12 + ["evaluated"]
    assert 2 <= len(backend.tries(BASELINE)) <= 3  # not one for each


@pytest.mark.parametrize("kind", ["error", "refused"])
def test_error_of_a_candidate_fails_it_and_no_worker(backend, pool, kind):
    fault = Fault(kind, "KeyError: 'layer'", "search/evaluator.py:120", "Traceback ...")
    backend.does = faulty(fault, {0})
    found = done_of(pool, 0, 1)
    reason = "KeyError: 'layer' at search/evaluator.py:120"
    assert found[0].outcome == Outcome("failed", reason=reason)
    assert found[0].trace == "Traceback ..."
    assert found[1].outcome.kind == "evaluated"
    assert (len(backend.tries(0)), backend.stopped) == (1, {})
    assert pool.workers.faults == {kind: 1}


def test_candidate_that_hangs_every_worker_fails_after_longer_and_longer_waits(backend, pool):
    backend.does = faulty(HANG, {0})
    found = done_of(pool, *range(300))
    reason = f"timeout: no answer in time, {MAX_TRIES['timeout']} times"
    assert found[0].outcome == Outcome("failed", reason=reason)
    workers = backend.tries(0)
    waits = [backend.waited(worker) for worker in workers]
    # Of the first nothing is known but how long the dense model took.
    allowed = [GRACE + FACTOR * 0.05, 2 * (GRACE + FACTOR * 0.1), 4 * (GRACE + FACTOR * 0.1)]
    assert list(backend.stopped) == workers
    assert all(a < wait < a + 1 for wait, a in zip(waits, allowed, strict=True)), waits


def test_suspended_driver_finds_nobody_late_and_takes_what_came_meanwhile(backend, pool):
    backend.does = faulty(HANG, {0})
    submit(pool, 0)
    backend.seconds += 86400
    assert turns(pool, 5) == []
    backend.takes = 86400.0
    assert kinds_of(pool, 1) == ["evaluated"]
    assert not backend.stopped


@pytest.mark.parametrize("other", [HANG, REFUSED])
def test_work_starts_with_the_first_worker_that_is_ready(backend, other):
    backend.places = 3
    backend.starts = lambda worker: "the model" if worker == 2 else other
    pool = pool_of(backend)
    assert kinds_of(pool, 0) == ["evaluated"]
    assert backend.tries(0) == [2]


def test_workers_that_cannot_start_again_end_the_run_with_the_reason(backend, pool):
    backend.starts = lambda worker: REFUSED
    backend.does = lambda worker, job: LOST
    submit(pool, 0, 1)
    with pytest.raises(Resumable, match=r"no worker could be started, .*model 'm' cannot be") as e:
        turns(pool, 1000)
    assert "\n" not in str(e.value)
    assert len(backend.tries(0)) == 1  # to a worker that was there
    assert backend.started <= 2 + 2 * MOST_STARTS


@pytest.mark.parametrize(
    ("places", "least", "stopped", "why"),
    [(2, START, [1, 2], ".*: timeout: did not start in time"), (0, WAIT, [], "$")],
)
def test_pool_waits_its_time_for_room_and_for_workers_that_never_start(
    backend, places, least, stopped, why
):
    backend.places, backend.starts = places, lambda worker: HANG
    pool = pool_of(backend)
    before = backend.seconds
    with pytest.raises(Resumable, match=rf"no worker for 300 s \(ray.wait_seconds\){why}"):
        pool.start()
    assert least <= backend.seconds - before < least + 2
    assert list(backend.stopped) == stopped


def test_workers_lost_while_they_start_cost_no_try_and_are_not_waited_for_without_end(backend):
    backend.places = 3
    pool = ready_pool(backend)
    backend.starts = lambda worker: LOST
    backend.does = lambda worker, job: LOST
    submit(pool, 0)
    before = backend.seconds
    with pytest.raises(Resumable, match="no worker for 300 s"):
        turns(pool, 10000)
    assert WAIT < backend.seconds - before < WAIT + 70
    assert len(backend.tries(0)) == 3  # all that were ready
    assert backend.started < 100  # with longer and longer breaks


def test_worker_with_another_model_is_refused_and_gets_nothing(backend):
    backend.starts = lambda worker: "another" if worker == 2 else "the model"
    pool = pool_of(backend)
    done_of(pool, *range(5))
    assert 2 in backend.stopped
    assert 2 not in {worker for worker, _ in backend.given}
    assert "its models are not the run's" in pool.workers.trouble


def test_worker_whose_node_lacked_memory_is_replaced_a_minute_later_whatever_is_lost_then(backend):
    backend.places = 3
    backend.does = faulty(CROWDED, {0}, times=1)
    pool = ready_pool(backend)
    assert kinds_of(pool, 0) == ["evaluated"]
    backend.does = faulty(LOST, {1}, times=1)
    assert kinds_of(pool, 1) == ["evaluated"]
    for seconds, ready in ((50, 1), (15, 3)):
        turns(pool, 2 * seconds)
        assert pool.workers.ready == ready


@pytest.mark.parametrize("fault", FAULTS.values())
def test_calls_of_the_run_are_done_again_after_a_fault(backend, fault):
    seen, kept = [], {}

    def does(worker, job):
        if job not in seen:
            seen.append(job)
            return fault
        return (job.method, *job.arguments)

    backend.does = does
    pool = ready_pool(backend, keep=kept.__setitem__)
    wanted = [(0, role, None) for role in ("report", "selection")]
    expected = {one: ("losses", *one) for one in wanted}
    assert pool.losses("losses", [*wanted, *wanted]) == expected == kept
    assert list(pool.tensors("collect_statistics", [0])) == [(0, ("collect_statistics", 0))]
    assert list(pool.tensors("probe_tensors", [0])) == [(0, ("probe_tensors", 0))]
    assert list(pool.tensors("probe_tensors", [])) == []


@pytest.mark.parametrize(
    ("fault", "error", "line"),
    [
        (Fault("refused", "ValueError: no text", "x:1", "t"), ValueError, "ValueError: no text"),
        (Fault("error", "KeyError: 'X'", "x.py:7", "t"), CallError, "KeyError: 'X' at x.py:7"),
    ],
)
def test_call_of_the_run_that_cannot_be_done_is_one_line(backend, pool, fault, error, line):
    backend.does = lambda worker, job: fault
    with pytest.raises(error, match=f"^a worker failed in probe_tensors: {line}$") as raised:
        next(pool.tensors("probe_tensors", [0]))
    assert getattr(raised.value, "trace", "t") == "t"
    with pytest.raises(error, match=f"^a worker failed in shortening: {line}$"):
        pool.shorter("leaving out", record_of(7, "W", 0.1, "model"))


def test_worker_without_room_waits_and_takes_no_time_to_start(backend):
    backend.places = 1
    pool = ready_pool(backend, workers=3)
    turns(pool, 2 * int(START) + 100)
    assert (pool.workers.ready, pool.workers.starting, pool.workers.faults) == (1, 2, {})
    backend.places = 3
    turns(pool, 5)
    assert pool.workers.ready == 3


# Jobs in steps


@dataclass
class Stepping:
    """Workers that answer to a candidate, or a `shortening`, with steps, and then with a result."""

    steps: int
    result: object = Outcome("evaluated", 0.5)
    only: int | None = None  # the index whose candidate is in steps; None: all
    faults: dict = field(default_factory=dict)  # what comes in place of a worker's n-th answer
    done: Counter = field(default_factory=Counter)  # answers by worker and job

    def __call__(self, worker, job):
        if self.only not in (None, job.is_candidate and job.candidate.index):
            return Outcome("evaluated", 1.0)
        self.done[worker, job.number] += 1
        count = self.done[worker, job.number]
        if fault := self.faults.pop((worker, count), None):
            return fault
        return Step(count, self.steps) if count <= self.steps else self.result


def test_each_step_has_its_own_time(backend, pool):
    backend.takes = 4.0
    backend.does = stepping = Stepping(40, only=0)
    assert kinds_of(pool, 0) == ["evaluated"]
    assert 40 * backend.takes > GRACE + FACTOR * backend.takes  # in all it was longer than one may
    assert (backend.stopped, pool.workers.faults) == ({}, {})
    first = backend.tries(0)[0]
    stepping.only, stepping.faults = 1, {(first, 3): HANG}
    assert kinds_of(pool, 1) == ["evaluated"]
    assert list(backend.stopped) == [first]
    allowed = GRACE + FACTOR * backend.takes
    assert allowed < backend.waited(first) < allowed + 5  # from its third step on


@pytest.mark.parametrize(("kind", "fault"), FAULTS.items())
def test_fault_between_steps_lets_another_worker_begin_again(backend, pool, kind, fault):
    backend.does = stepping = Stepping(3, only=0)
    first = sorted(backend.staff)[0]
    stepping.faults = {(first, 3): fault}
    submit(pool, 0)
    seen = []
    while not (done := turns(pool, 1)):
        steps = [step for _, step in pool.workers.descents]
        seen += [step.done for step in steps if [step.done] != seen[-1:]]
    assert done[0].outcome == Outcome("evaluated", 0.5)
    assert seen == [1, 2, 1, 2, 3]
    tries = backend.tries(0)
    assert tries[:3] == [first] * 3 and tries[3:] == [tries[3]] * 4 and tries[3] != first
    assert (pool.workers.faults, pool.workers.descents) == ({kind: 1}, [])
    # The time of the first is not the second's.
    assert done[0].timing["seconds"] == pytest.approx(4 * backend.takes)


def test_status_says_how_far_some_descents_are():
    status = {"state": "running", "best": None, "per_hour": 60}
    status |= {kind: {} for kind in ("outcomes", "workers", "faults")}
    far = {str(index): [index, 9] for index in range(1, SHOWN + 3)}
    (line,) = set(lines_of(status | {"descents": far})) - set(lines_of(status))
    shown = ", ".join(f"candidate {index} at step {index} of 9" for index in range(1, SHOWN + 1))
    assert line == f"descents: {shown} and 2 more"
    assert lines_of(status | {"descents": {}}) == lines_of(status)


# Finalists with ever fewer factors


@pytest.mark.parametrize("fault", [None, *FAULTS.values()])
@pytest.mark.parametrize("path", [[], [(Criterion.parse("W", "model"), Metric("G"))]])
def test_shorter_gives_the_path_of_a_candidate_whatever_happens(backend, pool, fault, path):
    backend.does = stepping = Stepping(2)
    stepping.result = path
    if fault:
        stepping.faults = {(sorted(backend.staff)[0], 2): fault}
    record = record_of(7, "W", 0.1, "model")
    assert pool.shorter("leaving out", record) == path
    asked = {(job.method, *job.arguments) for _, job in backend.given}
    assert asked == {("shortening", record.criterion, 7)}
    assert not any(job.is_candidate for _, job in backend.given)
    assert sum(pool.workers.faults.values()) == bool(fault)
