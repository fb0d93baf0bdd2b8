"""The loop on a synthetic fitness: one journal for every order of arrival, every cut, every lag."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pruning.metric import Metric
from search.evolution import Settings, evolve
from search.population import Candidate, Outcome, Record, State
from search.primitives import primitive_set
from search.variation import Variation

VARIATION = Variation(
    primitives=primitive_set("release"),
    min_initial_depth=1,
    max_initial_depth=3,
    max_depth=5,
    max_size=15,
    crossover=0.7,
    mutation=0.6,
    mutations={"node": 1, "subtree": 1, "hoist": 1, "insert": 1},
)
SEEDS = tuple(map(Metric.parse, ("mul(W, sqrt(X))", "mul(W, W)", "W")))
SETTINGS = Settings(
    seed=5,
    candidates=60,
    population=8,
    lag=7,
    group="row",
    seeds=SEEDS,
    pool=0.5,
    parents=3,
    variation=VARIATION,
)
STILL = replace(VARIATION, crossover=0, mutation=0)
"""Children that are their first parent."""

Pick = Callable[[list[Candidate]], int | None]
"""Which of the waiting candidates comes next, by place; None for none in time."""


@dataclass
class Evaluations:
    """Outcomes by a pure function of a candidate, handed out in the order that `pick` says."""

    pick: Pick
    waiting: list[Candidate] = field(default_factory=list)
    submitted: list[Candidate] = field(default_factory=list)

    def submit(self, candidate: Candidate) -> None:
        self.waiting.append(candidate)
        self.submitted.append(candidate)

    def next_outcome(self) -> tuple[int, Outcome] | None:
        place = self.pick(self.waiting)
        if place is None:
            return None
        candidate = self.waiting.pop(place)
        return candidate.index, outcome_of(candidate)


def digits(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def outcome_of(candidate: Candidate) -> Outcome:
    """Shorter texts are fitter, more or less; some fail, and the hopeless are stopped."""
    if digits(candidate.metric) % 11 == 0:
        return Outcome("failed", reason="out of memory")
    fitness = 3 + len(candidate.metric) / 40 + digits(candidate.metric) % 100 / 100
    if candidate.stop_above is not None and fitness > 1.2 * candidate.stop_above:
        return Outcome("stopped", tokens=10, reason=f"above {candidate.stop_above}")
    return Outcome("evaluated", fitness, 100)


def mark_of(metric: Metric) -> str:
    """A mask fingerprint that some formulas share and some have none of."""
    if digits(metric.text) % 7 == 0:
        raise ValueError(f"'{metric.text}' is constant")
    return f"{digits(metric.text) % 97:02}"


def first(waiting: list[Candidate]) -> int:
    return 0


def last(waiting: list[Candidate]) -> int:
    return -1


def shuffled(seed: int) -> Pick:
    draw = random.Random(seed)
    return lambda waiting: draw.randrange(len(waiting))


def racing(seed: int, workers: int = 3) -> Pick:
    """Workers hold the oldest candidates; often none is done yet, then any of them is."""
    draw = random.Random(seed)

    def pick(waiting: list[Candidate]) -> int | None:
        return None if draw.random() < 0.6 else draw.randrange(min(workers, len(waiting)))

    return pick


def run(
    settings: Settings,
    pick: Pick = first,
    start: State | None = None,
    records: Iterable[Record] = (),
) -> list[tuple[Record, State, State]]:
    """What `evolve` yields, to its end."""
    loop = evolve(settings, mark_of, Evaluations(pick), start or State(), list(records))
    return list(loop)


def records_of(steps: list[tuple[Record, State, State]]) -> list[Record]:
    return [record for record, _, _ in steps]


@cache
def whole(lag: int = SETTINGS.lag) -> list[tuple[Record, State, State]]:
    """The uninterrupted run, outcomes in order of submission."""
    return run(replace(SETTINGS, lag=lag))


def state_after(records: Iterable[Record]) -> State:
    state = State()
    for record in records:
        state = state.commit(record, SETTINGS.population)
    return state


# The same journal, however the workers race and wherever the run was cut


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(
    "pick", [last, shuffled(3), racing(4), racing(5, workers=20)], ids=["lifo", "random", "3", "20"]
)
def test_evolve_gives_the_same_records_whatever_the_order_of_arrival(lag, pick):
    assert run(replace(SETTINGS, lag=lag), pick) == whole(lag)


@pytest.mark.parametrize("cut", [0, 1, 3, 6, 7, 8, 9, 30, 59, 60])
def test_evolve_resumed_from_nothing_but_records_equals_uninterrupted(cut):
    records = records_of(whole())
    assert run(SETTINGS, racing(cut), State(), records[:cut]) == whole()[cut:]


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize("cut", [1, 3, 6, 7, 8, 9, 30, 59, 60])
def test_evolve_resumed_from_the_resumable_state_equals_uninterrupted(cut, lag):
    records = records_of(whole(lag))
    _, _, resumable = whole(lag)[cut - 1]
    assert resumable.committed == max(0, cut - lag)
    assert run(replace(SETTINGS, lag=lag), last, resumable, records[:cut]) == whole(lag)[cut:]


@examples(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 59), st.integers(0, 59), st.integers(0, 20), st.integers(0, 99))
def test_evolve_resumed_from_an_older_checkpoint_equals_uninterrupted(cut, earlier, lag, seed):
    steps, records = whole(lag), records_of(whole(lag))
    _, _, resumable = steps[min(cut, earlier + 1) - 1]
    again = run(replace(SETTINGS, lag=lag), racing(seed), resumable, records[:cut])
    assert again == steps[cut:]


def test_evolve_is_cut_at_each_record_in_turn_and_ends_the_same():
    records: list[Record] = []
    start = State()
    while len(records) < SETTINGS.candidates:
        loop = evolve(SETTINGS, mark_of, Evaluations(last), start, records[:])
        for record, _, resumable in islice(loop, 4):
            records.append(record)
            start = resumable
    assert records == records_of(whole())


def test_evolve_with_more_candidates_keeps_the_prefix():
    more = replace(SETTINGS, candidates=90)
    longer = run(more)
    assert longer[:60] == whole()
    _, _, resumable = whole()[-1]
    assert run(more, last, resumable, records_of(whole())) == longer[60:]


def test_evolve_with_another_seed_breeds_other_candidates():
    other = records_of(run(replace(SETTINGS, seed=6)))
    metrics = {record.metric for record in records_of(whole())[len(SEEDS) :]}
    assert len(metrics & {record.metric for record in other}) < len(metrics) / 2


def test_evolve_neither_uses_nor_moves_the_module_random():
    random.seed(1)
    before = random.getstate()
    assert run(SETTINGS) == whole()
    assert random.getstate() == before


# What the records say


def test_evolve_commits_every_index_once_in_order_with_all_kinds_of_outcome():
    steps = whole()
    assert [record.index for record, _, _ in steps] == list(range(60))
    assert [state.committed for _, state, _ in steps] == list(range(1, 61))
    kinds = Counter(record.outcome for record, _, _ in steps)
    assert set(kinds) == {"evaluated", "stopped", "duplicate", "degenerate", "failed"}
    assert steps[-1][1] == state_after(records_of(steps))


def test_evolve_breeds_the_seeds_first_in_canonical_text():
    texts = [(record.metric, record.parents) for record in records_of(whole())[:3]]
    assert texts == [("mul(W, sqrt(X))", ()), ("W", ()), ("W", ())]


def test_evolve_names_the_first_of_a_text_and_of_a_mask():
    records = records_of(whole())
    by_text: dict[str, int] = {}
    by_mask: dict[str, int] = {}
    reasons = Counter()
    for record in records:
        if record.metric in by_text:
            expected = f"same text as {by_text[record.metric]}"
        elif record.fingerprint in by_mask:
            expected = f"same mask as {by_mask[record.fingerprint]}"
        else:
            expected = None
        assert (record.outcome == "duplicate") == (expected is not None)
        if expected:
            assert record.reason == expected
            assert (record.fitness, record.tokens) == (None, 0)
            reasons[expected[:9]] += 1
        by_text.setdefault(record.metric, record.index)
        if record.fingerprint:
            by_mask.setdefault(record.fingerprint, record.index)
    assert set(reasons) == {"same text", "same mask"}


def test_evolve_records_why_a_metric_is_degenerate_and_never_evaluates_it():
    evaluations = Evaluations(first)
    records = [r for r, _, _ in evolve(SETTINGS, mark_of, evaluations, State(), [])]
    degenerate = [record for record in records if record.outcome == "degenerate"]
    for record in degenerate:
        assert record.reason == f"'{record.metric}' is constant"
        assert record.fingerprint is None
    submitted = {candidate.index for candidate in evaluations.submitted}
    evaluated = {r.index for r in records if r.outcome in ("evaluated", "stopped", "failed")}
    assert degenerate
    assert submitted == evaluated


# Breeding


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolve_breeds_from_exactly_the_outcomes_that_the_lag_lets_it_wait_for(lag):
    settings = replace(SETTINGS, lag=lag)
    evaluations = Evaluations(racing(1, workers=20))
    records = [r for r, _, _ in evolve(settings, mark_of, evaluations, State(), [])]
    bred_from = [state_after(records[: max(0, i - lag)]) for i in range(60)]
    for candidate in evaluations.submitted:
        worst = bred_from[candidate.index].worst_fitness(8)
        assert candidate.stop_above == worst
        members = {member.index for member in bred_from[candidate.index].population}
        assert set(candidate.parents) <= members
    limits = [candidate.stop_above for candidate in evaluations.submitted]
    assert limits[0] is None
    assert limits[-1] is not None
    assert any(candidate.parents for candidate in evaluations.submitted)


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolve_submits_as_soon_as_the_lag_allows_and_no_sooner(lag):
    committed = 0
    seen: list[tuple[int, int]] = []

    class Watched(Evaluations):
        def submit(self, candidate: Candidate) -> None:
            seen.append((candidate.index, committed))
            super().submit(candidate)

    for _ in evolve(replace(SETTINGS, lag=lag), mark_of, Watched(last), State(), []):
        committed += 1
    assert [at for _, at in seen] == [max(0, index - lag) for index, _ in seen]


def test_evolve_breeds_children_of_two_different_members_once_there_is_a_population():
    records = records_of(run(replace(SETTINGS, lag=0, population=20)))
    assert sum(record.outcome == "evaluated" for record in records[:15]) > 2
    assert all(record.parents == () for record in records[:20])
    children = [record for record in records[20:] if record.parents]
    assert len(children) > 20
    for child in children:
        one, other = child.parents
        assert one != other
        assert child.metric not in (records[one].metric, records[other].metric)


def test_evolve_replaces_a_child_that_equals_a_parent_by_a_random_tree():
    records = records_of(run(replace(SETTINGS, variation=STILL)))
    assert {record.parents for record in records} == {()}
    assert len({record.metric for record in records}) > 30


def test_evolve_breeds_random_trees_while_fewer_than_two_were_evaluated():
    def all_degenerate(metric: Metric) -> str:
        raise ValueError("no")

    steps = list(evolve(SETTINGS, all_degenerate, Evaluations(first), State(), []))
    assert {record.outcome for record, _, _ in steps} == {"degenerate", "duplicate"}
    assert {record.parents for record, _, _ in steps} == {()}
    assert steps[-1][1] == State(60)


def test_evolve_fixes_the_threshold_of_a_seed_too_once_the_population_is_full():
    seeds = tuple(map(Metric.parse, ("W", "G", "log(W)", "log(G)", "exp(W)", "exp(G)", "tanh(W)")))
    settings = replace(SETTINGS, seeds=seeds, population=2, lag=0, candidates=7)
    evaluations = Evaluations(first)
    records = [r for r, _, _ in evolve(settings, mark_of, evaluations, State(), [])]
    limits = []
    for candidate in evaluations.submitted:
        before = [r.fitness for r in records[: candidate.index] if r.fitness is not None]
        limits.append(sorted(before)[1] if len(before) > 1 else None)
    assert [candidate.stop_above for candidate in evaluations.submitted] == limits
    assert limits[-1] is not None


def test_evolve_stops_when_asked_with_what_was_committed():
    done: list[Record] = []
    evaluations = Evaluations(racing(2))
    loop = evolve(SETTINGS, mark_of, evaluations, State(), [], lambda: len(done) >= 20)
    for record, _, _ in loop:
        done.append(record)
    assert done == records_of(whole())[:20]
    assert max(candidate.index for candidate in evaluations.submitted) <= 19 + SETTINGS.lag
