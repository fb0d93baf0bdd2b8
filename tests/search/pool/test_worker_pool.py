"""The pool's policy, against a crew that follows a script: every fault, and who is to blame."""

from collections import defaultdict, deque
from dataclasses import dataclass, field

import pytest
import torch

from pruning.criterion import Criterion
from search.fitness import Setup, Task
from search.pool.crew import Ended, Fault, Reply, Started
from search.pool.jobs import MOST, MOST_SUSPECTS
from search.pool.protocol import CallError, LossRequest, MaskRequest, PoolError
from search.pool.roster import MOST_STARTS
from search.pool.worker_pool import FACTOR, GRACE, WorkerPool
from search.population import Candidate, Outcome
from search.resident import Subject

HANG = object()
LOST = Fault("lost", "its process or its node was lost")
CROWDED = Fault("crowded", "Ray ended it: its node lacked memory")
EXHAUSTED = Fault("exhausted", "OutOfMemoryError: out of memory")
REFUSED = Fault("refused", "ValueError: model 'm' cannot be loaded")
WITNESS, TOKENS, WAIT, START = -1, 64, 300.0, 600.0


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@dataclass
class ScriptedCrew:
    """A crew whose workers do what a test says.

    Attributes:
        places: How many workers there is room for.
        does: From a worker and its call to a result, a fault or HANG.
        starts: From a worker to its models' digest, a fault or HANG.
        takes: Seconds of any call.
        dead: Workers whose end nobody knows yet.
        given: All calls, as (worker, method, candidate's index or None).
    """

    clock: Clock
    places: int = 2
    does: object = lambda worker, call: Outcome("evaluated", 1.0)
    starts: object = lambda worker: "the model"
    takes: float = 0.1
    dead: set = field(default_factory=set)
    given: list = field(default_factory=list)
    hired: int = 0
    staff: set = field(default_factory=set)
    wishes: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    dismissed: list = field(default_factory=list)
    given_at: dict = field(default_factory=dict)
    ended_at: dict = field(default_factory=dict)
    coming: deque = field(default_factory=deque)

    def room(self):
        return max(0, self.places - len(self.staff))

    def hire(self):
        self.hired += 1
        self.staff.add(self.hired)
        start = self.starts(self.hired)
        if isinstance(start, Fault):
            self._end(self.hired, start)
        elif start is not HANG:
            self.coming.append(Started(self.hired, (start,), 0.05))
        return self.hired

    def give(self, worker, call):
        assert worker in self.staff
        subject = call.arguments[0] if call.arguments else None
        index = subject.index if isinstance(subject, Candidate) else None
        self.given.append((worker, call.method, index))
        self.given_at[worker] = self.clock.seconds
        came = LOST if worker in self.dead else None
        if came is None:
            came = None if call.method == "ping" else self.does(worker, call)
        if isinstance(came, Fault) and came.kind in ("lost", "crowded"):
            self._end(worker, came)
        elif came is not HANG:
            self.coming.append(Reply(worker, came, {"seconds": self.takes}))

    def watch(self, progress):
        self.progress = progress

    def dismiss(self, worker):
        self.dismissed.append(worker)
        self.ended_at[worker] = self.clock.seconds
        self.staff.discard(worker)
        self.coming = deque(event for event in self.coming if event.worker != worker)

    def events(self, seconds):
        self.waits.append(seconds)
        self.clock.seconds += self.takes if self.coming else seconds
        events = list(self.coming)
        self.coming.clear()
        return events

    def share(self, tensors):
        return tensors

    def wish(self, workers):
        self.wishes.append(workers)

    def _end(self, worker, fault):
        self.staff.discard(worker)
        self.coming.append(Ended(worker, fault))

    def tries(self, index):
        return [worker for worker, method, other in self.given if other == index]


def candidate(index):
    return Candidate(index, Criterion.parse("mul(W, X)", "row"))


def a_setup():
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    windows = dict.fromkeys(("calibration", "fitness", "selection", "report"), tokens)
    return Setup(
        subjects=(Subject("m", "float32"),),
        windows=(windows,),
        tasks=(Task("t", 0, 0.5, None, 1.0),),
        leaves=frozenset("X"),
        objective="nll",
        device="cpu",
        threads=1,
        stages=(),
        slack=0.1,
        hopeless=3.0,
    )


@pytest.fixture
def crew():
    return ScriptedCrew(Clock())


def pool_of(crew, workers=None):
    return WorkerPool(crew, a_setup(), workers, WAIT, START, crew.clock)


def ready_pool(crew, workers=None):
    pool = pool_of(crew, workers)
    pool.model_digest(0)
    for _ in range(3):
        pool.next_outcome()
    crew.given.clear()
    return pool


def turns(pool, count):
    return [arrival for _ in range(count) if (arrival := pool.next_outcome())]


def pass_time(pool, crew, seconds):
    until = crew.clock.seconds + seconds
    while crew.clock.seconds < until:
        assert pool.next_outcome() is None


def drive(pool, count, most_turns=3000):
    """Return so many outcomes by candidate, and all that else arrives on the way."""
    found = {}
    for _ in range(most_turns):
        if arrival := pool.next_outcome():
            assert arrival.index not in found
            found[arrival.index] = arrival
        if len(found) == count:
            return found
    raise AssertionError(f"only {sorted(found)} arrived")


def faulty(fault, bad, times=10**6):
    """Return what workers do if some candidates come to a fault, so many times each."""
    left = defaultdict(lambda: times)

    def does(worker, call):
        index = call.arguments[0].index if call.method == "evaluate" else None
        if index in bad and left[index] > 0:
            left[index] -= 1
            return fault
        return Outcome("evaluated", 1.0)

    return does


# Work is handed out


def test_every_candidate_has_one_outcome_with_its_timing(crew):
    pool = ready_pool(crew)
    for index in range(5):
        pool.submit(candidate(index))
    found = drive(pool, 5)
    assert {arrival.outcome.kind for arrival in found.values()} == {"evaluated"}
    assert found[0].timing == {"seconds": 0.1, "worker": 1}
    assert [index for _, _, index in crew.given] == [0, 1, 2, 3, 4]


def test_a_worker_that_waits_gets_a_candidate_at_once(crew):
    pool = ready_pool(crew)
    before = crew.clock.seconds
    pool.submit(candidate(0))
    assert crew.given == [(1, "evaluate", 0)]
    assert crew.clock.seconds == before


def test_what_arrived_is_handed_over_without_a_wait(crew):
    pool = ready_pool(crew)
    for index in range(4):
        pool.submit(candidate(index))
    crew.waits.clear()
    drive(pool, 4)
    # Two come together; while the second is handed over, the workers do not wait for work.
    assert crew.waits == [0.5, 0.0, 0.0, 0.0]


def test_the_queue_is_worked_off_in_order_and_what_was_tried_comes_first(crew):
    crew.places = 1
    crew.does = faulty(LOST, {0, 1}, times=2)
    pool = ready_pool(crew)
    for index in range(4):
        pool.submit(candidate(index))
    drive(pool, 4)
    assert [index for _, method, index in crew.given] == [0, 0, 0, 1, 1, 1, 2, 3]


def test_two_that_were_lost_together_go_on_in_their_order(crew):
    crew.does = faulty(LOST, {0, 1}, times=1)
    pool = ready_pool(crew)
    for index in range(3):
        pool.submit(candidate(index))
    crew.places = 1  # the second worker's place is gone
    drive(pool, 3)
    assert [index for _, method, index in crew.given if index is not None] == [0, 1, 0, 1, 2]


# Who is to blame


@pytest.mark.parametrize("fault", [LOST, CROWDED, EXHAUSTED], ids=lambda fault: fault.kind)
def test_a_fault_that_passes_changes_nothing(crew, fault):
    most = MOST[fault.kind]
    crew.does = faulty(fault, {0}, times=most - 1)
    pool = ready_pool(crew)
    for index in range(3):
        pool.submit(candidate(index))
    assert {a.outcome.kind for a in drive(pool, 3).values()} == {"evaluated"}
    workers = crew.tries(0)
    assert len(workers) == len(set(workers)) == most  # a fresh worker each time
    assert pool.staff.faults == {fault.kind: most - 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (LOST, f"ended every worker that it was given to, {{0}} of {{0}}: {LOST.reason}"),
        (CROWDED, f"ended every worker that it was given to, {{0}} of {{0}}: {CROWDED.reason}"),
        (EXHAUSTED, "OutOfMemoryError: out of memory, {0} times"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_candidate_that_brings_every_worker_down_fails_with_the_reason(crew, fault, reason):
    crew.does = faulty(fault, {1})
    pool = ready_pool(crew)
    for index in range(4):
        pool.submit(candidate(index))
    found = drive(pool, 4)
    most = MOST[fault.kind]
    assert found[1].outcome == Outcome("failed", reason=reason.format(most))
    assert {found[index].outcome.kind for index in (0, 2, 3)} == {"evaluated"}
    assert len(crew.tries(1)) == most


def test_the_last_try_is_made_only_after_another_call_was_answered(crew):
    """While all are lost, none is blamed: those to whom it only happened are evaluated."""
    down = {"until": 10**9}

    def does(worker, call):
        return LOST if crew.hired < down["until"] else Outcome("evaluated", 1.0)

    crew.does = does
    pool = ready_pool(crew)
    for index in range(2):
        pool.submit(candidate(index))
    while len(crew.tries(0)) < MOST["lost"] - 1 or len(crew.tries(1)) < MOST["lost"] - 1:
        assert pool.next_outcome() is None
    assert len(crew.tries(0)) == len(crew.tries(1)) == MOST["lost"] - 1
    down["until"] = crew.hired + 3  # the outage ends while the baseline is evaluated
    assert {a.outcome.kind for a in drive(pool, 2).values()} == {"evaluated"}
    assert crew.tries(WITNESS)


def test_a_candidate_that_is_alone_is_judged_by_a_baseline(crew):
    crew.does = faulty(EXHAUSTED, {0})
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    found = drive(pool, 1)
    assert list(found) == [0]  # the baseline is no candidate of the search
    assert found[0].outcome.kind == "failed"
    assert [index for _, _, index in crew.given] == [0, 0, WITNESS, 0]


def test_a_baseline_that_is_answered_with_an_error_tells_as_much(crew):
    broken = Fault("error", "KeyError: 'X'", "search/fitness.py:1", "trace")

    def does(worker, call):
        return broken if call.arguments[0].index == WITNESS else LOST

    crew.does = does
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    found = drive(pool, 1)
    assert list(found) == [0]
    assert found[0].outcome.reason.startswith("ended every worker")


@pytest.mark.parametrize("fault", [LOST, CROWDED, EXHAUSTED], ids=lambda fault: fault.kind)
def test_where_nothing_can_be_evaluated_the_pool_is_to_blame(crew, fault):
    crew.does = lambda worker, call: fault
    pool = ready_pool(crew)
    for index in range(8):
        pool.submit(candidate(index))
    with pytest.raises(PoolError, match=f"no worker functions: .*{fault.reason}") as error:
        turns(pool, 3000)
    assert "\n" not in str(error.value)
    assert len(crew.tries(WITNESS)) == MOST[fault.kind]
    assert len(crew.given) <= 2 * (MOST_SUSPECTS + 1) * MOST[fault.kind]  # with two workers


def test_nothing_arrives_before_the_pool_gives_up(crew):
    crew.does = lambda worker, call: EXHAUSTED
    pool = ready_pool(crew)
    for index in range(8):
        pool.submit(candidate(index))
    arrivals = []
    with pytest.raises(PoolError):
        for _ in range(3000):
            arrivals += turns(pool, 1)
    assert arrivals == []


@pytest.mark.parametrize("kind", ["error", "refused"])
def test_what_else_is_raised_fails_its_candidate_and_no_worker(crew, kind):
    fault = Fault(kind, "KeyError: 'layer'", "search/fitness.py:120", "Traceback ...")
    crew.does = faulty(fault, {0})
    pool = ready_pool(crew)
    for index in range(2):
        pool.submit(candidate(index))
    found = drive(pool, 2)
    reason = "KeyError: 'layer' at search/fitness.py:120"
    assert found[0].outcome == Outcome("failed", reason=reason)
    assert found[0].trace == "Traceback ..."
    assert found[1].outcome.kind == "evaluated"
    assert len(crew.tries(0)) == 1
    assert crew.dismissed == []
    assert pool.staff.faults == {kind: 1}


# Calls that do not come back


def test_a_hung_worker_is_ended_and_its_candidate_given_to_another(crew):
    first = []
    crew.does = lambda worker, call: HANG if not first else Outcome("evaluated", 2.0)
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    first.append(crew.tries(0)[0])
    found = drive(pool, 1)
    assert found[0].outcome == Outcome("evaluated", 2.0)
    assert crew.dismissed == first
    assert pool.staff.faults == {"late": 1}


def test_a_candidate_that_hangs_every_worker_is_a_timeout_after_longer_and_longer_waits(crew):
    crew.does = faulty(HANG, {0})
    pool = ready_pool(crew)
    for index in range(300):
        pool.submit(candidate(index))
    found = drive(pool, 300)
    reason = f"timeout: no answer to evaluate in time, {MOST['late']} times"
    assert found[0].outcome == Outcome("failed", reason=reason)
    workers = crew.tries(0)
    waits = [crew.ended_at[worker] - crew.given_at[worker] for worker in workers]
    # Of the first nothing is known but how long the dense model took.
    allowed = [GRACE + FACTOR * 0.05, 2 * (GRACE + FACTOR * 0.1), 4 * (GRACE + FACTOR * 0.1)]
    assert len(workers) == MOST["late"]
    assert all(a < wait < a + 1 for wait, a in zip(waits, allowed, strict=True)), waits


def test_what_is_allowed_follows_the_longest_evaluation(crew):
    crew.places, crew.takes = 1, 4.0
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    drive(pool, 1)
    crew.does = faulty(HANG, {1})
    pool.submit(candidate(1))
    while crew.tries(1) == []:
        pool.next_outcome()
    began = crew.clock.seconds
    while not crew.dismissed:
        pool.next_outcome()
    allowed = GRACE + FACTOR * 4.0
    assert allowed < crew.clock.seconds - began < allowed + 2


def test_while_this_process_is_stopped_nobody_is_late(crew):
    crew.does = lambda worker, call: HANG
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    crew.clock.seconds += 86400
    turns(pool, 5)
    assert crew.dismissed == []


def test_an_answer_that_came_while_this_process_was_stopped_counts(crew):
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    crew.takes = 86400.0
    assert drive(pool, 1)[0].outcome.kind == "evaluated"
    assert crew.dismissed == []


# Workers that start, or do not


def test_work_starts_with_the_first_worker_that_is_ready(crew):
    crew.places = 3
    crew.starts = lambda worker: "the model" if worker == 2 else HANG
    pool = pool_of(crew)
    pool.submit(candidate(0))
    drive(pool, 1)
    assert crew.tries(0) == [2]
    assert (pool.staff.ready, pool.staff.starting) == (1, 2)


def test_a_wrong_value_at_the_very_first_start_is_said_at_once(crew):
    crew.starts = lambda worker: REFUSED
    pool = pool_of(crew)
    before = crew.clock.seconds
    with pytest.raises(PoolError, match="no worker could be started: ValueError: model 'm'"):
        pool.model_digest(0)
    assert crew.clock.seconds - before < 2
    assert crew.hired == 2


def test_a_node_that_refuses_does_not_end_what_another_can_do(crew):
    crew.starts = lambda worker: REFUSED if worker % 2 else "the model"
    pool = pool_of(crew)
    pool.submit(candidate(0))
    assert drive(pool, 1)[0].outcome.kind == "evaluated"
    assert crew.tries(0) == [2]


def test_workers_that_cannot_start_again_end_the_run_with_the_reason(crew):
    pool = ready_pool(crew)
    crew.starts = lambda worker: REFUSED
    crew.does = lambda worker, call: LOST
    for index in range(2):
        pool.submit(candidate(index))
    with pytest.raises(PoolError, match=r"no worker could be started, .*model 'm' cannot be") as e:
        turns(pool, 1000)
    assert "\n" not in str(e.value)
    assert len(crew.tries(0)) == 1  # to a worker that was there
    assert crew.hired <= 2 + 2 * MOST_STARTS


def test_failed_starts_elsewhere_do_not_end_a_run_whose_only_worker_is_lost(crew):
    crew.starts = lambda worker: REFUSED if worker > 1 else "the model"
    pool = pool_of(crew)
    pool.model_digest(0)
    turns(pool, 100)
    assert crew.hired > 1 + MOST_STARTS
    crew.starts = lambda worker: "the model"
    crew.does = faulty(LOST, {0}, times=1)
    pool.submit(candidate(0))
    assert drive(pool, 1)[0].outcome.kind == "evaluated"


def test_a_worker_that_never_starts_is_given_up_after_its_time(crew):
    crew.starts = lambda worker: HANG
    pool = pool_of(crew)
    before = crew.clock.seconds
    with pytest.raises(PoolError, match=r"no worker for 300 s .*: timeout: did not start in time"):
        pool.model_digest(0)
    assert START <= crew.clock.seconds - before < START + 2
    assert crew.dismissed == [1, 2]


def test_workers_lost_while_they_start_cost_no_try_and_are_not_waited_for_without_end(crew):
    crew.places = 3
    pool = ready_pool(crew)
    crew.starts = lambda worker: LOST
    crew.does = lambda worker, call: LOST
    pool.submit(candidate(0))
    before = crew.clock.seconds
    with pytest.raises(PoolError, match="no worker for 300 s"):
        turns(pool, 10000)
    assert WAIT < crew.clock.seconds - before < WAIT + 70
    assert len(crew.tries(0)) == 3  # all that were ready
    assert crew.hired < 100  # with longer and longer breaks


def test_workers_that_die_in_starting_one_by_one_are_not_waited_for_without_end(crew):
    """There is always one that starts, and never one that is ready."""
    crew.starts = lambda worker: HANG
    pool = pool_of(crew)
    before = crew.clock.seconds
    with pytest.raises(PoolError, match="no worker for 300 s"):
        for turn in range(10000):
            if turn % 20 == 19 and crew.staff:
                crew._end(min(crew.staff), LOST)
            pool.next_outcome()
    assert crew.clock.seconds - before < WAIT + 100


def test_without_room_the_pool_waits_as_long_as_it_is_told_to(crew):
    crew.places = 0
    pool = pool_of(crew)
    before = crew.clock.seconds
    with pytest.raises(PoolError, match=r"no worker for 300 s \(ray.wait_seconds\)$"):
        pool.model_digest(0)
    assert WAIT < crew.clock.seconds - before < WAIT + 2


def test_a_worker_that_comes_in_time_is_waited_for(crew):
    crew.places = 0
    pool = pool_of(crew)
    pool.submit(candidate(0))
    turns(pool, int(WAIT / 0.5) - 10)
    crew.places = 1
    assert drive(pool, 1)[0].outcome.kind == "evaluated"


def test_a_worker_with_another_model_is_refused_and_gets_nothing(crew):
    crew.starts = lambda worker: "another" if worker == 2 else "the model"
    pool = pool_of(crew)
    for index in range(5):
        pool.submit(candidate(index))
    drive(pool, 5)
    assert 2 in crew.dismissed
    assert 2 not in {worker for worker, _, _ in crew.given}
    assert "its models are not the run's" in pool.staff.trouble


# Elastic


def test_the_pool_grows_with_the_room_and_shrinks_with_it(crew):
    pool = ready_pool(crew)
    assert pool.staff.ready == 2
    crew.places = 5
    turns(pool, 10)
    assert pool.staff.ready == 5
    crew.places = 1
    crew.dead.update(crew.staff - {1})
    turns(pool, 20)
    assert (pool.staff.ready, crew.hired) == (1, 5)


def test_no_more_are_hired_than_asked_for_and_a_cluster_is_told(crew):
    crew.places = 5
    pool = ready_pool(crew, workers=3)
    turns(pool, 20)
    assert (pool.staff.ready, crew.hired) == (3, 3)
    assert set(crew.wishes) == {3}


def test_a_lost_worker_is_replaced_at_once(crew):
    crew.does = faulty(LOST, {0}, times=1)
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    turns(pool, 2)
    assert crew.hired == 3


def test_where_memory_runs_short_again_there_is_a_worker_less_for_a_while(crew):
    crew.places = 4
    crew.does = faulty(CROWDED, {0, 1, 2}, times=1)
    pool = ready_pool(crew)
    pool.submit(candidate(0))
    drive(pool, 1)
    turns(pool, 20)
    assert pool.staff.ready == 4  # once may happen
    for index in (1, 2):
        pool.submit(candidate(index))
        drive(pool, 1)
    turns(pool, 20)
    assert pool.staff.ready == 2
    pass_time(pool, crew, 3600)
    assert pool.staff.ready == 4


def test_one_worker_is_left_however_short_memory_runs(crew):
    crew.does = faulty(CROWDED, {0, 1, 2, 3}, times=2)
    pool = ready_pool(crew)
    for index in range(4):
        pool.submit(candidate(index))
    assert {a.outcome.kind for a in drive(pool, 4).values()} == {"evaluated"}
    assert pool.staff.ready + pool.staff.starting == 1


# Workers that die in silence


def test_an_idle_worker_that_died_costs_no_candidate_a_try(crew):
    pool = ready_pool(crew)
    crew.dead.update(crew.staff)
    turns(pool, 10)  # it is asked now and then, so that another is hired before it is needed
    assert pool.staff.faults == {"lost": 2}
    pool.submit(candidate(0))
    drive(pool, 1)
    assert not set(crew.tries(0)) & crew.dead


def test_a_node_that_dies_while_it_is_idle_costs_one_try_at_most(crew):
    crew.places = 2 * MOST["lost"]
    pool = ready_pool(crew)
    turns(pool, 4)
    crew.dead.update(crew.staff - {crew.hired})  # all have just been heard of
    pool.submit(candidate(0))
    assert drive(pool, 1)[0].outcome.kind == "evaluated"
    assert len(crew.tries(0)) <= 2


def test_an_idle_worker_that_hangs_is_replaced(crew):
    pool = ready_pool(crew)
    crew.coming = deque()
    give = crew.give
    crew.give = lambda worker, call: give(worker, call) if worker != 1 else None
    turns(pool, 80)
    assert crew.dismissed == [1]
    assert pool.staff.ready == 2


# What workers are told first, and calls that a run cannot do without


def test_all_workers_have_all_statistics_before_any_job_late_ones_too(crew):
    pool = pool_of(crew)
    pool.model_digest(0)
    for subject in range(2):
        pool.use_statistics(subject, {})
    crew.places, crew.takes = 3, 1.0
    for index in range(30):
        pool.submit(candidate(index))
    drive(pool, 30)
    for worker in range(1, 4):
        methods = [method for other, method, _ in crew.given if other == worker]
        assert methods[:2] == ["use_statistics"] * 2
        assert set(methods[2:]) <= {"evaluate", "ping"} and "evaluate" in methods


@pytest.mark.parametrize("fault", [LOST, EXHAUSTED, Fault("error", "KeyError: 1", "x.py:1")])
def test_statistics_that_end_every_worker_end_the_run(crew, fault):
    pool = ready_pool(crew)
    crew.does = lambda worker, call: fault if call.method == "use_statistics" else None
    pool.use_statistics(0, {})
    pool.submit(candidate(0))
    with pytest.raises(PoolError, match=f"no worker.*{fault.reason}"):
        turns(pool, 10000)
    assert crew.tries(0) == []
    assert crew.hired < 100


@pytest.mark.parametrize("fault", [LOST, CROWDED, EXHAUSTED, HANG])
def test_statistics_masks_and_losses_are_done_again_after_a_fault(crew, fault):
    seen = []

    def does(worker, call):
        if call not in seen:
            seen.append(call)
            return fault
        return [call.arguments]

    crew.does = does
    pool = ready_pool(crew)
    criterion = Criterion.parse("W", "row")
    assert pool.collect_statistics(0) == [(0,)]
    assert pool.probe_tensors(0) == [(0,)]
    requests = [LossRequest(0, role, None) for role in ("report", "selection")]
    assert pool.losses(requests) == [[(0, "report", None)], [(0, "selection", None)]]
    masks = pool.zeros_and_overlap([MaskRequest(0, criterion, criterion)])
    assert masks == [[(0, criterion, criterion)]]


def test_a_wrong_value_in_such_a_call_is_one_line(crew):
    crew.does = lambda worker, call: Fault("refused", "ValueError: no such text", "x.py:1", "t")
    pool = ready_pool(crew)
    with pytest.raises(ValueError, match=r"^a worker failed in losses: ValueError: no such text$"):
        pool.losses([LossRequest(0, "report", None)])


def test_any_other_error_in_such_a_call_has_its_place_and_trace(crew):
    fault = Fault("error", "KeyError: 'X'", "search/fitness.py:7", "Traceback ...")
    crew.does = lambda worker, call: fault
    pool = ready_pool(crew)
    message = "a worker failed in probe_tensors: KeyError: 'X' at search/fitness.py:7"
    with pytest.raises(CallError, match=message) as error:
        pool.probe_tensors(0)
    assert error.value.trace == "Traceback ..."


def test_the_staff_tells_who_is_ready_busy_and_starting(crew):
    crew.places = 3
    crew.starts = lambda worker: HANG if worker == 3 else "the model"
    pool = ready_pool(crew)
    crew.does = lambda worker, call: HANG
    pool.submit(candidate(0))
    staff = pool.staff
    assert (staff.ready, staff.busy, staff.starting) == (2, 1, 1)
    assert (staff.faults, staff.trouble) == ({}, "")
