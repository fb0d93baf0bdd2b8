"""The loop on a synthetic fitness: one journal for every order of arrival, every cut, every lag."""

import hashlib
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.evolution import Evolution, State
from prunevolve.search.records import Candidate, Outcome, Record
from prunevolve.search.surrogate import Surrogate

SEEDS = tuple(Criterion.parse(text, "row") for text in ("mul(W, sqrt(X))", "mul(W, W)", "W"))


def changed(search, **changes):
    return search.model_copy(update=changes)


PLAIN = Search(
    **{"seed": 5, "candidates": 60, "population": 8, "lag": 7, "primitives": "release"},
    **{"initial_depth": (1, 3), "max_size": 15, "parents": 3, "crowding": 0, "brood": 1},
)
FULL = changed(PLAIN, candidates=160, population=7, crowding=0.0065, brood=3, primitives="extended")
"""Everything switched on."""

KINDS = {"plain": PLAIN, "full": FULL}


def digits(criterion):
    return int(hashlib.sha256(criterion.text.encode()).hexdigest()[:8], 16)


class Drawn:
    """Masks of which some formulas share one and some have none; a distance is one of marks."""

    def mark(self, criterion):
        return f"{digits(criterion) % 199:03}" if digits(criterion) % 7 else None

    def fingerprint(self, criterion):
        if not self.mark(criterion):
            raise DegenerateScores(f"'{criterion.text}' is constant")
        return self.mark(criterion)

    def distance(self, one, other):
        return abs(int(self.fingerprint(one)) - int(self.fingerprint(other))) / 1000

    def sketch(self, criterion):
        return np.frombuffer(criterion.text.ljust(64)[:64].encode(), np.uint64)


def outcome_of(candidate):
    number = digits(candidate.criterion)
    if number % 11 == 0:
        return Outcome("failed", reason="out of memory")
    rise = (len(candidate.criterion.text) / 40 + number % 100 / 100) / 50
    if candidate.part:
        return Outcome("sampled", None, 5, "to tune numbers", rise, (rise,))
    if candidate.limit is not None and rise > 1.3 * candidate.limit:
        return Outcome("stopped", None, 10, f"above {candidate.limit}", rise, (rise,))
    return Outcome("evaluated", rise, 100, rises=(rise,))


def first(waiting):
    return 0


def racing(seed, workers=3):
    """Workers hold the oldest candidates; often none is done yet, then any of them is."""
    draw = random.Random(seed)

    def pick(waiting):
        return None if draw.random() < 0.6 else draw.randrange(min(workers, len(waiting)))

    return pick


@dataclass(frozen=True)
class Step:
    records: Sequence[Record]
    state: State
    resumable: State


@dataclass
class Searching:
    """Asks and tells as a search does: at once what is decided, the rest as `pick` says."""

    evolution: Evolution
    pick: object = first
    asked: list[Candidate] = field(default_factory=list)

    def __iter__(self):
        waiting: list[Candidate] = []
        while not self.evolution.done:
            for candidate in self.evolution.ask():
                self.asked.append(candidate)
                if candidate.decided:
                    yield from self.told(candidate, candidate.decided)
                else:
                    waiting.append(candidate)
            assert waiting or self.evolution.done, "it asks for nothing, and nothing is on its way"
            if waiting and (place := self.pick(waiting)) is not None:
                candidate = waiting.pop(place)
                yield from self.told(candidate, outcome_of(candidate))

    def told(self, candidate, outcome):
        if records := self.evolution.tell(candidate.index, outcome):
            yield Step(records, self.evolution.state, self.evolution.resumable)


def beginning(search, records=(), start=None):
    breeder = Breeder(search, "row", SEEDS)
    return Evolution(breeder, [1.0], Drawn(), start or State(), records)


def searched(search, pick=first):
    searching = Searching(beginning(search), pick)
    return [record for step in searching for record in step.records], searching


@cache
def whole(lag=7, kind="plain"):
    """The uninterrupted search, told one outcome after the other, whoever decided it."""
    evolution = beginning(changed(KINDS[kind], lag=lag))
    waiting: deque[Candidate] = deque()
    steps = []
    while not evolution.done:
        waiting.extend(evolution.ask())
        candidate = waiting.popleft()
        records = evolution.tell(candidate.index, candidate.decided or outcome_of(candidate))
        steps.append(Step(records, evolution.state, evolution.resumable))
    return steps


def journal(lag=7, kind="plain"):
    return [record for step in whole(lag, kind) for record in step.records]


def assert_continues(evolution, pick, cut, lag=7, kind="plain"):
    """Check that a search goes on after `cut` records just as the uninterrupted one does."""
    if cut:
        assert evolution.state == whole(lag, kind)[cut - 1].state
        assert evolution.resumable == whole(lag, kind)[cut - 1].resumable
    for step in Searching(evolution, pick):
        start, cut = cut, cut + len(step.records)
        assert step.records == journal(lag, kind)[start:cut]
        assert step.state == whole(lag, kind)[cut - 1].state
        assert step.resumable == whole(lag, kind)[cut - 1].resumable
    assert cut == len(journal(lag, kind))
    assert evolution.done and list(evolution.ask()) == []


def near_of(search):
    return lambda one, other: Drawn().distance(one, other) < search.crowding


def state_after(records, search):
    state = State()
    for record in records:
        state = state.commit(record, search, near_of(search))
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(
    "pick",
    [first, lambda waiting: -1, racing(4), racing(5, workers=20)],
    ids=["fifo", "lifo", "3", "20"],
)
def test_evolution_gives_the_same_records_whatever_the_order_of_arrival(lag, pick, kind):
    assert_continues(beginning(changed(KINDS[kind], lag=lag)), pick, 0, lag, kind)


@examples(max_examples=40, deadline=None, derandomize=True)
@given(
    *(st.floats(0, 1), st.one_of(st.none(), st.integers(0, 159)), st.integers(0, 20)),
    *(st.integers(0, 99), st.sampled_from(list(KINDS))),
)
def test_evolution_resumed_equals_uninterrupted(share, checkpoint, lag, seed, kind):
    """From its journal alone, or from a checkpoint of any age beside it."""
    steps = whole(lag, kind)
    cut = 1 + round(share * (len(steps) - 1))
    assert steps[cut - 1].resumable.committed == max(0, cut - lag)
    start = None if checkpoint is None else steps[min(cut, checkpoint + 1) - 1].resumable
    evolution = beginning(changed(KINDS[kind], lag=lag), journal(lag, kind)[:cut], start)
    assert_continues(evolution, racing(seed), cut, lag, kind)


@pytest.mark.parametrize("off", [{"crowding": 0.0}, {"brood": 1}])
def test_every_rule_of_the_full_search_is_at_work(off):
    """Else the tests above would say nothing about the rules."""
    assert searched(changed(FULL, **off))[0] != journal(7, "full")


def test_ask_decides_what_needs_no_evaluation():
    records, searching = searched(PLAIN)
    kinds = {candidate.decided.kind for candidate in searching.asked if candidate.decided}
    assert kinds == {"duplicate", "degenerate"}
    for candidate, record in zip(searching.asked, records, strict=True):
        assert record.outcome == (candidate.decided or outcome_of(candidate))
        if record.outcome.kind == "degenerate":
            assert record.outcome.reason == f"'{record.criterion.text}' is constant"
            assert record.candidate.fingerprint is None


def test_evolution_commits_every_index_once_in_order_with_all_kinds_of_outcome():
    assert [len(step.records) for step in whole()] == [1] * 60
    assert [record.index for record in journal()] == list(range(60))
    kinds = {record.outcome.kind for record in journal()}
    assert kinds == {"evaluated", "stopped", "duplicate", "degenerate", "failed"}
    assert whole()[-1].state == state_after(journal(), PLAIN)


def test_evolution_names_the_first_of_a_text_and_of_a_mask():
    firsts: dict[str | None, int] = {}
    reasons = Counter()
    for record in journal():
        text, mark = record.criterion.text, record.candidate.fingerprint
        twins = {"same text": firsts.get(text), "same mask": firsts.get(mark)}
        known = [f"{what} as {index}" for what, index in twins.items() if index is not None]
        assert record.outcome.reason == known[0] if known else record.outcome.kind != "duplicate"
        reasons.update(reason[:9] for reason in known[:1])
        firsts.setdefault(text, record.index)
        if mark:
            firsts.setdefault(mark, record.index)
    assert set(reasons) == {"same text", "same mask"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolution_breeds_from_exactly_the_outcomes_that_the_lag_lets_it_wait_for(lag, kind):
    search = changed(KINDS[kind], lag=lag)
    records, searching = searched(search, pick=racing(1, workers=20))
    bred_from = [state_after(records[: max(0, i - lag)], search) for i in range(len(records))]
    submitted = [candidate for candidate in searching.asked if not candidate.decided]
    for candidate in submitted:
        state = bred_from[candidate.index]
        limited = state.with_limits(candidate, search, near_of(search))
        assert candidate.limit == limited.limit
        assert candidate.best == limited.best
        members = [state.tuning.start] if candidate.tuned else state.population
        assert set(candidate.parents) <= {member.index for member in members}
    assert any(candidate.limit is not None for candidate in submitted)
    assert any(candidate.parents for candidate in submitted)
    assert any(candidate.tuned for candidate in submitted) == (kind == "full")


BROODS = changed(PLAIN, brood=6, lag=0)


def test_brood_yields_its_new_child_with_the_lowest_prediction(monkeypatch):
    def predict(self, criteria):
        return [float(len(criterion.text)) for criterion in criteria]

    monkeypatch.setattr(Surrogate, "predict", predict)
    evolution, known, chosen = beginning(BROODS), set(), 0
    while not evolution.done:
        index, state = evolution.state.committed, evolution.state
        (candidate,) = evolution.ask()
        if index >= BROODS.population:
            children = evolution.breeder.brood(index, state.population, state.tuning)
            brood = [child.criterion for child in children]
            new = [child for child in brood if Drawn().mark(child) not in {None, *known}]
            if new:
                assert len(candidate.criterion.text) == min(len(child.text) for child in new)
                chosen += 1
        known.add(Drawn().mark(candidate.criterion))
        evolution.tell(index, candidate.decided or outcome_of(candidate))
    assert chosen > 25
