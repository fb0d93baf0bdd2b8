"""The loop on a synthetic fitness: one journal for every order of arrival, every cut, every lag."""

import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.ranking import DegenerateScores
from prunevolve.search import evolution as loop
from prunevolve.search.breeding.product import can_descend, exponents_of, product_of_powers
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.variation import Breeder
from prunevolve.search.evolution import Evolution, State
from prunevolve.search.records import Candidate, Outcome, Record

SEEDS = tuple(Criterion.parse(text, "row") for text in ("mul(W, sqrt(X))", "mul(W, W)", "W"))


def changed(search, **changes):
    return search.model_copy(update=changes)


PLAIN = Search(
    **{"seed": 5, "candidates": 60, "population": 8, "lag": 7, "primitives": "release"},
    **{"initial_depth": (1, 3), "max_size": 15, "parents": 3},
)
FULL = changed(PLAIN, candidates=160, population=7, primitives="extended")
"""Everything switched on."""

KINDS = {"plain": PLAIN, "full": FULL}
EVERY = 4


@pytest.fixture(scope="module", autouse=True)
def descents():
    """Let one candidate in four be a descent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "DESCENTS", EVERY)
        yield


def digits(criterion):
    return int(hashlib.sha256(criterion.text.encode()).hexdigest()[:8], 16)


class Drawn:
    """Masks of which some formulas share one and some have none."""

    def mark(self, criterion):
        return f"{digits(criterion) % 61:03}" if digits(criterion) % 7 else None

    def fingerprint(self, criterion):
        if not self.mark(criterion):
            raise DegenerateScores(f"'{criterion.text}' is constant")
        return self.mark(criterion)


def down_from(criterion):
    """Where a descent leads: all exponents are others."""
    powers = exponents_of(criterion.metric, relative=False)
    moved = {base: round(1.2 * exponent + 0.11, 2) for base, exponent in powers.items()}
    tuned = simplify(replace(criterion, metric=product_of_powers(moved.items())))
    return criterion if tuned.metric.problem else tuned


def outcome_of(candidate):
    number = digits(candidate.criterion)
    if number % 11 == 0:
        return Outcome("failed", reason="out of memory")
    tuned = down_from(candidate.criterion) if candidate.origin == "descent" else None
    number, length = digits(tuned or candidate.criterion), len(candidate.criterion.text)
    rise = (length / 40 + number % 100 / 100) / 50
    if candidate.limits and rise > 1.3 * candidate.limits.entry:
        return Outcome("stopped", None, 10, f"above {candidate.limits.entry}")
    return Outcome("evaluated", rise, 100, tuned=tuned)


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


def beginning(search, records=(), start=None, seeds=SEEDS):
    breeder = Breeder(search, "row", tuple(seeds))
    return Evolution(breeder, Drawn(), start or State(), records)


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


@cache
def read_back(lag, kind):
    """The journal of the uninterrupted search, from its lines."""
    lines = [json.dumps(record.to_dict()) for record in journal(lag, kind)]
    return [Record.from_dict(json.loads(line)) for line in lines]


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


def state_after(records, search):
    state = State()
    for record in records:
        state = state.commit(record, search)
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
    records = read_back(lag, kind)[:cut]
    start = None if checkpoint is None else steps[min(cut, checkpoint + 1) - 1].resumable
    if start:
        content = json.loads(json.dumps(start.to_checkpoint()))
        assert State.from_checkpoint(content, records) == start
        start = State.from_checkpoint(content, records)
    evolution = beginning(changed(KINDS[kind], lag=lag), records, start)
    assert_continues(evolution, racing(seed), cut, lag, kind)


def test_ask_decides_what_needs_no_evaluation_and_each_index_is_committed_once_in_order():
    records, searching = searched(PLAIN)
    decided = {candidate.decided.kind for candidate in searching.asked if candidate.decided}
    assert decided == {"duplicate", "degenerate"}
    for candidate, record in zip(searching.asked, records, strict=True):
        assert record.outcome == (candidate.decided or outcome_of(candidate))
        if record.outcome.kind == "degenerate":
            assert record.outcome.reason == f"'{record.criterion.text}' is constant"
            assert record.candidate.fingerprint is None
    assert [record.index for record in records] == list(range(60))
    kinds = {record.outcome.kind for record in records}
    assert kinds == decided | {"evaluated", "stopped", "failed"}
    # No descents with the release's set.
    assert {record.candidate.origin for record in records} == {"seed", "random", "child"}
    assert [len(step.records) for step in whole()] == [1] * 60
    assert whole()[-1].state == state_after(records, PLAIN)


# Descents


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize("signed", [False, True])
def test_descents_begin_from_the_fittest_seed_twice_then_from_the_best_from_which_none_began(
    lag, signed
):
    search = changed(FULL, lag=lag)
    # From what is below 0 where X is below 1 none can; more seeds than come before it is due.
    texts = ["mul(W, log(X))", "mul(W, log(G))"] if signed else ["mul(W, cube(X))", "mul(W, G)"]
    seeds = [*(() if signed else SEEDS), *(Criterion.parse(text, "row") for text in texts)]
    records = [x for step in Searching(beginning(search, seeds=seeds)) for x in step.records]
    begun = []
    for record in records:
        known = records[: max(0, record.index - lag)]
        of_seeds = [x for x in known if x.candidate.origin == "seed" and x.fitness is not None]
        of_seeds.sort(key=lambda x: x.rank)
        new = [x for x in state_after(known, search).population if x.index not in begun]
        able = [*of_seeds, *new] if len(begun) < loop.STARTS else new
        best = next((x for x in able if can_descend(x.criterion.metric)), None)
        is_due = record.index % EVERY == EVERY - 1 and record.index >= len(seeds)
        is_due = is_due and best is not None
        assert (record.candidate.origin == "descent") == is_due
        if is_due:
            assert record.candidate.parents == (best.index,)
            assert record.candidate.criterion == best.criterion
            begun.append(best.index)
    assert len(set(begun)) > 5
    assert signed or begun[0] == begun[1] < len(seeds)


@pytest.mark.parametrize("lag", [0, 1, 7, 20])
def test_duplicate_names_the_first_of_its_text_or_mask_also_one_that_a_descent_led_to(lag):
    bred: dict[str, int] = {}  # the first index of each text and mask
    led_to: dict[str, int] = {}  # the same of masks that descents led to
    kinds = Counter()
    for record in journal(lag, "full"):
        index, outcome, mark = record.index, record.outcome, Drawn().mark(record.criterion)
        if outcome.tuned:  # committed after all that were bred before
            known = [first[mark] for first in (bred, led_to) if mark in first]
            assert record.candidate.fingerprint == mark
            expected = "degenerate" if not mark else "duplicate" if known else "evaluated"
            assert outcome.kind == expected
            if mark and known:
                assert outcome.tokens == 100
                assert outcome.reason == f"same mask as {min(known)}"
                assert outcome.fitness is None
            kinds[outcome.kind] += 1
            if mark:
                led_to.setdefault(mark, index)
        elif record.candidate.origin != "descent":
            text = record.criterion.text
            known = [bred[mark]] if mark in bred else []
            if led_to.get(mark, index) < index - lag:  # others were not committed yet
                known.append(led_to[mark])
            if text in bred:
                assert outcome.reason == f"same text as {bred[text]}"
            elif mark and known:
                assert outcome.reason == f"same mask as {min(known)}"
            else:
                assert outcome.kind != "duplicate"
            kinds[outcome.reason[:9]] += outcome.kind == "duplicate"
            for key in filter(None, (text, mark)):
                bred.setdefault(key, index)
    assert all(kinds[x] for x in ("evaluated", "duplicate", "same text", "same mask")), kinds
