"""The loop on a synthetic fitness: one journal for every order of arrival, every cut, every lag."""

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from toy_records import named

from pruning.criterion import Criterion
from pruning.masks import DegenerateScores
from search.breeding.primitives import primitive_set
from search.breeding.variation import Variation
from search.evolution import Evolution, Marks, Settings, breed
from search.population import Candidate, Outcome, Record, Rules, State
from search.surrogate import Sketch, Surrogate

VARIATION = Variation(
    primitives=primitive_set("release"),
    min_initial_depth=1,
    max_initial_depth=3,
    products=0.0,
    exchange=0.0,
    max_depth=5,
    max_size=15,
    crossover=0.7,
    mutation=0.6,
    mutations={"node": 1, "subtree": 1, "hoist": 1, "insert": 1},
)
SEEDS = tuple(Criterion.parse(text, "row") for text in ("mul(W, sqrt(X))", "mul(W, W)", "W"))
SETTINGS = Settings(
    seed=5,
    candidates=60,
    rules=Rules(capacity=8, lag=7),
    groups=("row",),
    regroup=0.0,
    within=0.0,
    seeds=SEEDS,
    pool=0.5,
    parents=3,
    simplified=True,
    crowding=0.0,
    brood=1,
    exploration=0.0,
    variation=VARIATION,
)
GROUPED = replace(SETTINGS, groups=("row", "layer", "model"), regroup=0.2, within=0.25)
FULL = replace(
    GROUPED,
    candidates=160,
    crowding=12.5,
    brood=3,
    exploration=0.3,
    rules=Rules(capacity=7, resolution=0.05, kept=2, patience=20, lag=7),
)
"""Everything switched on."""

KINDS = {"plain": SETTINGS, "full": FULL}
STILL = replace(VARIATION, crossover=0, mutation=0)
"""Children that are their first parent."""

CUTS = [("plain", cut) for cut in (1, 3, 6, 7, 8, 9, 30, 59, 60)]
CUTS += [("full", cut) for cut in (1, 7, 9, 30, *range(40, 160, 8), 159, 160)]

Pick = Callable[[list[Candidate]], int | None]
"""Which of the waiting candidates comes next, by place; None for none in time."""


def digits(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


class Drawn:
    """Masks of which some formulas share one and some have none; a distance is one of marks."""

    def fingerprint(self, criterion: Criterion) -> str:
        if digits(criterion.text) % 7 == 0:
            raise DegenerateScores(f"'{criterion.text}' is constant")
        return f"{digits(f'{criterion.group} {criterion.text}') % 397:03}"

    def distance(self, one: Criterion, other: Criterion) -> float:
        return abs(int(self.fingerprint(one)) - int(self.fingerprint(other)))

    def sketch(self, criterion: Criterion) -> Sketch:
        return (np.frombuffer(criterion.text.ljust(64)[:64].encode(), np.uint64),)


@dataclass
class Refusing(Drawn):
    """Masks that no formula has."""

    error: ValueError

    def fingerprint(self, criterion: Criterion) -> str:
        raise self.error


def outcome_of(candidate: Candidate) -> Outcome:
    """Shorter texts are fitter, more or less; one group is not; some fail, some are stopped."""
    text, group = candidate.criterion.text, candidate.criterion.group
    number = digits(f"{group} {text}")
    if number % 11 == 0:
        return Outcome("failed", reason="out of memory")
    behind = 0.5 if group == "layer" else 0
    fitness = 3 + len(text) / 40 + number % 100 / 100 + behind
    if candidate.stop_above is not None and fitness > 1.1 * candidate.stop_above:
        reason = f"above {candidate.stop_above}"
        return Outcome("stopped", None, 10, reason, fitness, (fitness,))
    return Outcome("evaluated", fitness, 100, rises=(fitness,))


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


@dataclass(frozen=True)
class Step:
    """What an outcome let be committed, and the states after that."""

    records: Sequence[Record]
    state: State
    resumable: State


@dataclass
class Searching:
    """Asks and tells as a search does: at once what is decided, the rest as `pick` says."""

    evolution: Evolution
    pick: Pick = first
    asked: list[Candidate] = field(default_factory=list)

    def __iter__(self) -> Iterator[Step]:
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

    def told(self, candidate: Candidate, outcome: Outcome) -> Iterator[Step]:
        if records := self.evolution.tell(candidate.index, outcome):
            yield Step(records, self.evolution.state, self.evolution.resumable)

    @property
    def submitted(self) -> list[Candidate]:
        return [candidate for candidate in self.asked if not candidate.decided]


def beginning(
    settings: Settings, records: Iterable[Record] = (), start: State | None = None
) -> Evolution:
    return Evolution(settings, Drawn(), start or State(), records)


def searched(
    settings: Settings, marks: Marks | None = None, pick: Pick = first
) -> tuple[list[Record], Searching]:
    """The records of a whole search, and what was asked for."""
    search = Searching(Evolution(settings, marks or Drawn(), State()), pick)
    return [record for step in search for record in step.records], search


def records_of(settings: Settings) -> list[Record]:
    return searched(settings)[0]


def with_lag(settings: Settings, lag: int) -> Settings:
    return replace(settings, rules=replace(settings.rules, lag=lag))


@cache
def whole(lag: int = 7, kind: str = "plain") -> list[Step]:
    """The uninterrupted search, told one outcome after the other, whoever decided it."""
    evolution = beginning(with_lag(KINDS[kind], lag))
    waiting: deque[Candidate] = deque()
    steps = []
    while not evolution.done:
        waiting.extend(evolution.ask())
        candidate = waiting.popleft()
        records = evolution.tell(candidate.index, candidate.decided or outcome_of(candidate))
        steps.append(Step(records, evolution.state, evolution.resumable))
    return steps


def journal(lag: int = 7, kind: str = "plain") -> list[Record]:
    """The records of the uninterrupted search: one a step."""
    return [record for step in whole(lag, kind) for record in step.records]


def assert_continues(steps: Iterable[Step], cut: int, lag: int = 7, kind: str = "plain") -> None:
    """Check that steps go on after `cut` records just as the uninterrupted search does."""
    for step in steps:
        start, cut = cut, cut + len(step.records)
        assert step.records == journal(lag, kind)[start:cut]
        assert step.state == whole(lag, kind)[cut - 1].state
        assert step.resumable == whole(lag, kind)[cut - 1].resumable
    assert cut == len(journal(lag, kind))


def state_after(records: Iterable[Record], rules: Rules = SETTINGS.rules) -> State:
    state = State()
    for record in records:
        state = state.commit(record, rules)
    return state


# The same journal, however the workers race and wherever the run was cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(
    "pick",
    [first, last, shuffled(3), racing(4), racing(5, workers=20)],
    ids=["fifo", "lifo", "random", "3", "20"],
)
def test_evolution_gives_the_same_records_whatever_the_order_of_arrival(lag, pick, kind):
    evolution = beginning(with_lag(KINDS[kind], lag))
    assert_continues(Searching(evolution, pick), 0, lag, kind)


@pytest.mark.parametrize(("kind", "cut"), [("plain", 0), *CUTS])
def test_evolution_resumed_from_nothing_but_records_equals_uninterrupted(kind, cut):
    evolution = beginning(KINDS[kind], journal(kind=kind)[:cut])
    assert_continues(Searching(evolution, racing(cut)), cut, kind=kind)


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(("kind", "cut"), CUTS)
def test_evolution_resumed_from_the_resumable_state_equals_uninterrupted(kind, cut, lag):
    resumable = whole(lag, kind)[cut - 1].resumable
    assert resumable.committed == max(0, cut - lag)
    evolution = beginning(with_lag(KINDS[kind], lag), journal(lag, kind)[:cut], resumable)
    assert_continues(Searching(evolution, last), cut, lag, kind)


@examples(max_examples=30, deadline=None, derandomize=True)
@given(
    *(st.floats(0, 1), st.integers(0, 159), st.integers(0, 20), st.integers(0, 99)),
    st.sampled_from(list(KINDS)),
)
def test_evolution_resumed_from_an_older_checkpoint_equals_uninterrupted(
    share, earlier, lag, seed, kind
):
    steps, records = whole(lag, kind), journal(lag, kind)
    cut = 1 + round(share * (len(steps) - 1))
    resumable = steps[min(cut, earlier + 1) - 1].resumable
    evolution = beginning(with_lag(KINDS[kind], lag), records[:cut], resumable)
    assert_continues(Searching(evolution, racing(seed)), cut, lag, kind)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 60])
def test_evolution_replays_records_to_the_states_that_they_led_to(cut):
    evolution = beginning(SETTINGS, journal()[:cut])
    assert evolution.state == state_after(journal()[:cut])
    assert evolution.resumable == state_after(journal()[: max(0, cut - 7)])
    assert evolution.done == (cut == 60)


def test_evolution_of_all_its_records_is_done_and_asks_for_nothing():
    evolution = beginning(SETTINGS, journal())
    assert evolution.done
    assert list(evolution.ask()) == []


@pytest.mark.parametrize("lag", [0, 7])
def test_evolution_with_everything_on_has_every_rule_at_work(lag):
    """Else the tests above would say nothing about the rules."""
    full, records = with_lag(FULL, lag), journal(lag, "full")
    assert whole(lag, "full")[-1].state.began > 0
    assert {record.criterion.group for record in records} == set(FULL.groups)
    for rule, off in {"resolution": 0.0, "kept": 0, "patience": None}.items():
        without = replace(full, rules=replace(full.rules, **{rule: off}))
        assert records_of(without) != records, rule
    assert records_of(replace(full, crowding=0.0)) != records


def test_evolution_is_cut_at_each_record_in_turn_and_ends_the_same():
    records: list[Record] = []
    start = State()
    while len(records) < SETTINGS.candidates:
        evolution = beginning(SETTINGS, records, start)
        for step in islice(Searching(evolution, last), 2):
            records += step.records
            start = step.resumable
    assert records == journal()


def test_evolution_with_more_candidates_keeps_the_prefix():
    more = replace(SETTINGS, candidates=90)
    longer = records_of(more)
    assert longer[:60] == journal()
    extended = beginning(more, journal(), whole()[-1].resumable)
    steps = list(Searching(extended, last))
    assert [record for step in steps for record in step.records] == longer[60:]


def test_evolution_with_another_seed_breeds_other_candidates():
    other = records_of(replace(SETTINGS, seed=6))
    metrics = {record.criterion.text for record in journal()[len(SEEDS) :]}
    assert len(metrics & {record.criterion.text for record in other}) < len(metrics) / 2


def test_evolution_neither_uses_nor_moves_the_module_random():
    random.seed(1)
    before = random.getstate()
    assert records_of(SETTINGS) == journal()
    assert random.getstate() == before


# Ask and tell


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_ask_breeds_what_the_lag_allows_and_no_more_until_it_is_told(lag):
    evolution = beginning(with_lag(SETTINGS, lag))
    asked = list(evolution.ask())
    assert [candidate.index for candidate in asked] == list(range(lag + 1))
    assert list(evolution.ask()) == []
    evolution.tell(0, outcome_of(asked[0]))
    assert [candidate.index for candidate in evolution.ask()] == [lag + 1]


def test_ask_breeds_as_it_is_taken_so_that_what_is_told_meanwhile_counts():
    evolution = Evolution(with_lag(SETTINGS, 0), Refusing(DegenerateScores("no")), State())
    for candidate in evolution.ask():
        # Without a lag each is bred from the outcome of the one before it.
        assert evolution.state.committed == candidate.index
        evolution.tell(candidate.index, candidate.decided)
    assert evolution.done


def test_ask_that_is_left_goes_on_where_it_was_left():
    evolution = beginning(SETTINGS)
    taken = [next(evolution.ask()) for _ in range(3)]
    assert [candidate.index for candidate in [*taken, *evolution.ask()]] == list(range(8))


def test_ask_decides_what_needs_no_evaluation():
    records, search = searched(SETTINGS)
    kinds = {candidate.decided.kind for candidate in search.asked if candidate.decided}
    assert kinds == {"duplicate", "degenerate"}
    for candidate, record in zip(search.asked, records, strict=True):
        if candidate.decided:
            assert record.outcome == candidate.decided
            assert (record.fitness, record.outcome.tokens) == (None, 0)
            assert record.outcome.reason
        else:
            assert record.outcome == outcome_of(candidate)


def test_tell_commits_in_order_whatever_came_first():
    evolution = beginning(SETTINGS)
    asked = list(evolution.ask())
    outcomes = [candidate.decided or outcome_of(candidate) for candidate in asked]
    assert evolution.tell(2, outcomes[2]) == evolution.tell(1, outcomes[1]) == []
    assert evolution.state == State()
    assert evolution.tell(0, outcomes[0]) == list(map(Record, asked[:3], outcomes[:3]))
    assert evolution.state.committed == 3
    assert evolution.tell(3, outcomes[3]) == [Record(asked[3], outcomes[3])]


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize("pick", [first, last], ids=["fifo", "lifo"])
def test_evolution_asks_as_soon_as_the_lag_allows_and_no_sooner(lag, pick):
    evolution = beginning(with_lag(SETTINGS, lag))
    search = Searching(evolution, pick)
    for step in search:
        committed = step.state.committed
        assert len(search.asked) <= committed + lag + 1
        if not search.asked[-1].decided:  # then all that the lag allowed was taken
            before = committed - len(step.records)
            assert len(search.asked) == min(60, before + lag + 1)


def test_evolution_that_is_left_has_committed_a_beginning():
    search = Searching(beginning(SETTINGS), racing(2))
    records: list[Record] = []
    for step in search:
        records += step.records
        if len(records) >= 20:
            break
    assert records == journal()[: len(records)]
    assert search.evolution.state.committed == len(records) < 28


# What the records say


def test_evolution_commits_every_index_once_in_order_with_all_kinds_of_outcome():
    assert [len(step.records) for step in whole()] == [1] * 60
    assert [record.index for record in journal()] == list(range(60))
    assert [step.state.committed for step in whole()] == list(range(1, 61))
    kinds = Counter(record.outcome.kind for record in journal())
    assert set(kinds) == {"evaluated", "stopped", "duplicate", "degenerate", "failed"}
    assert whole()[-1].state == state_after(journal())


def test_evolution_breeds_the_seeds_first_in_canonical_text():
    texts = [(record.criterion.text, record.candidate.parents) for record in journal()[:3]]
    assert texts == [("mul(W, sqrt(X))", ()), ("W", ()), ("W", ())]


def test_evolution_names_the_first_of_a_text_and_of_a_mask():
    by_text: dict[str, int] = {}
    by_mask: dict[str, int] = {}
    reasons = Counter()
    for record in journal():
        text, mark = record.criterion.text, record.candidate.fingerprint
        if text in by_text:
            expected = f"same text as {by_text[text]}"
        elif mark in by_mask:
            expected = f"same mask as {by_mask[mark]}"
        else:
            expected = None
        assert (record.outcome.kind == "duplicate") == (expected is not None)
        if expected:
            assert record.outcome == Outcome("duplicate", reason=expected)
            reasons[expected[:9]] += 1
        by_text.setdefault(text, record.index)
        if mark:
            by_mask.setdefault(mark, record.index)
    assert set(reasons) == {"same text", "same mask"}


@pytest.mark.parametrize("cut", [10, 30])
def test_evolution_knows_texts_and_masks_from_before_it_was_resumed(cut):
    resumed = beginning(SETTINGS, journal()[:cut], whole()[cut - 1].resumable)
    records = [record for step in Searching(resumed) for record in step.records]
    reasons = {record.outcome.reason for record in records if record.outcome.kind == "duplicate"}
    assert any(int(reason.split()[-1]) < cut - 7 for reason in reasons)


def test_evolution_records_why_a_metric_is_degenerate_and_never_has_it_evaluated():
    records, search = searched(SETTINGS)
    degenerate = [record for record in records if record.outcome.kind == "degenerate"]
    for record in degenerate:
        assert record.outcome.reason == f"'{record.criterion.text}' is constant"
        assert record.candidate.fingerprint is None
    evaluated = {r.index for r in records if r.outcome.kind in ("evaluated", "stopped", "failed")}
    assert degenerate
    assert {candidate.index for candidate in search.submitted} == evaluated


def test_evolution_without_marks_knows_candidates_by_their_text_alone():
    # A crowding asks for distances, which nobody tells then.
    search = Searching(Evolution(replace(SETTINGS, crowding=0.5), None, State()))
    records = [record for step in search for record in step.records]
    assert {record.candidate.fingerprint for record in records} == {None}
    outcomes = [record.outcome for record in records]
    assert {o.reason[:9] for o in outcomes if o.kind == "duplicate"} == {"same text"}
    assert "degenerate" not in {outcome.kind for outcome in outcomes}


@pytest.mark.parametrize("marks", [None, Drawn()])
def test_evolution_takes_one_text_under_two_groups_for_two_candidates(marks):
    seeds = tuple(Criterion.parse("mul(W, G)", group) for group in ("row", "layer", "row", "model"))
    evolution = Evolution(replace(GROUPED, seeds=seeds, candidates=4), marks, State())
    records = [record for step in Searching(evolution) for record in step.records]
    assert [record.criterion.group for record in records] == ["row", "layer", "row", "model"]
    assert [record.outcome.reason for record in records] == ["", "", "same text as 0", ""]


def test_evolution_brings_a_metric_to_the_canonical_form_of_its_group():
    seeds = tuple(Criterion.parse("mms(W)", group) for group in ("model", "row", "layer"))
    records = records_of(replace(GROUPED, seeds=seeds, candidates=3))
    assert list(map(named, records)) == [("mms(W)", "model"), ("W", "row"), ("W", "layer")]


def test_evolution_leaves_texts_as_they_were_bred_if_not_to_be_simplified():
    records = records_of(replace(SETTINGS, simplified=False))
    assert [record.criterion for record in records[:3]] == list(SEEDS)


# Breeding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolution_breeds_from_exactly_the_outcomes_that_the_lag_lets_it_wait_for(lag, kind):
    records, search = searched(with_lag(KINDS[kind], lag), pick=racing(1, workers=20))
    rules, asked = search.evolution.rules, search.submitted
    bred_from = [state_after(records[: max(0, i - lag)], rules) for i in range(len(records))]
    for candidate in asked:
        state, criterion = bred_from[candidate.index], candidate.criterion
        like = [m.fitness for m in state.population if rules.near(criterion, m.criterion)]
        expected = min(like) if like else state.worst_fitness(criterion.group, rules)
        assert candidate.stop_above == expected
        assert set(candidate.parents) <= {member.index for member in state.population}
    assert asked[0].stop_above is None
    assert any(candidate.stop_above is not None for candidate in asked[30:])
    assert any(candidate.parents for candidate in asked)


def test_evolution_stops_above_exactly_what_would_not_enter_the_population():
    settings = replace(FULL, rules=replace(FULL.rules, resolution=0.0, patience=None, lag=0))
    records, search = searched(settings)
    rules, limits = search.evolution.rules, 0
    for candidate in search.submitted:
        state = state_after(records[: candidate.index], rules)
        for step in (-1e-6, 1e-6):
            limit = 9.0 if candidate.stop_above is None else candidate.stop_above
            record = Record(candidate, Outcome("evaluated", limit + step))
            entered = record in state.commit(record, rules).population
            assert entered == (candidate.stop_above is None or step < 0)
            limits += candidate.stop_above is not None
    assert limits > 20


@pytest.mark.parametrize(("crowding", "expected"), [(0.0, False), (12.0, False), (12.5, True)])
def test_evolution_takes_masks_for_one_that_differ_in_less_than_the_crowding(crowding, expected):
    class TwelveApart(Drawn):
        def distance(self, one: Criterion, other: Criterion) -> float:
            return 12.0

    rules = Evolution(replace(SETTINGS, crowding=crowding), TwelveApart(), State()).rules
    assert rules.near(SEEDS[0], SEEDS[2]) is expected


def test_evolution_breeds_children_of_two_different_members_once_there_is_a_population():
    records = records_of(replace(SETTINGS, rules=Rules(capacity=20)))
    assert sum(record.outcome.kind == "evaluated" for record in records[:15]) > 2
    assert all(record.candidate.parents == () for record in records[:20])
    children = [record for record in records[20:] if record.candidate.parents]
    assert len(children) > 20
    for child in children:
        one, other = child.candidate.parents
        assert one != other
        assert child.criterion not in (records[one].criterion, records[other].criterion)


def test_evolution_replaces_a_child_that_equals_a_parent_by_a_random_tree():
    records = records_of(replace(SETTINGS, variation=STILL))
    assert {record.candidate.parents for record in records} == {()}
    assert len({record.criterion for record in records}) > 30


def test_evolution_breeds_random_trees_while_fewer_than_two_were_evaluated():
    records, search = searched(SETTINGS, Refusing(DegenerateScores("no")))
    assert {record.outcome.kind for record in records} == {"degenerate", "duplicate"}
    assert {record.candidate.parents for record in records} == {()}
    assert search.evolution.state == State(60)


def test_evolution_does_not_take_a_mistake_for_a_degenerate_metric():
    mistake = ValueError("pattern must divide the inputs")
    with pytest.raises(ValueError, match="pattern must divide the inputs"):
        searched(SETTINGS, Refusing(mistake))


# Broods

BROODS = replace(SETTINGS, brood=6, rules=Rules(capacity=8, lag=0))


def mark_of(criterion: Criterion) -> str | None:
    try:
        return Drawn().fingerprint(criterion)
    except DegenerateScores:
        return None


def test_of_a_brood_the_child_with_the_lowest_prediction_is_the_candidate(monkeypatch):
    def predict(self: Surrogate, criteria: Sequence[Criterion]) -> list[float]:
        return [float(len(criterion.text)) for criterion in criteria]

    monkeypatch.setattr(Surrogate, "predict", predict)
    evolution, known, chosen = beginning(BROODS), set(), 0
    while not evolution.done:
        index, state = evolution.state.committed, evolution.state
        (candidate,) = evolution.ask()
        if index >= BROODS.rules.capacity:
            brood = [breed(BROODS, index, state, BROODS.rules, i).criterion for i in range(6)]
            new = [child for child in brood if mark_of(child) not in {None, *known}]
            if new:
                assert len(candidate.criterion.text) == min(len(child.text) for child in new)
                chosen += 1
        known.add(mark_of(candidate.criterion))
        evolution.tell(index, candidate.decided or outcome_of(candidate))
    assert chosen > 25


def test_of_a_brood_only_the_chosen_is_fingerprinted_unless_it_is_known():
    class Counting(Drawn):
        marked = 0

        def fingerprint(self, criterion: Criterion) -> str:
            self.marked += 1
            return f"{digits(f'{criterion.group} {criterion.text}'):03}"

    marks = Counting()
    records, _ = searched(BROODS, marks)
    assert {record.outcome.kind for record in records} >= {"evaluated", "stopped"}
    # Children of known texts are told by these.
    assert marks.marked == len(records) - sum(r.outcome.kind == "duplicate" for r in records)


def test_a_candidate_that_explores_is_one_mutation_of_a_member_and_nothing_is_predicted_of_it(
    monkeypatch,
):
    def predict(self: Surrogate, criteria: Sequence[Criterion]) -> list[float]:
        raise AssertionError("predicted")

    monkeypatch.setattr(Surrogate, "predict", predict)
    factors = replace(VARIATION, mutations={"factor": 1})
    records = records_of(replace(BROODS, exploration=1.0, simplified=False, variation=factors))
    children = children_of(records)
    assert len(children) > 25
    for child in children:
        parent = records[child.candidate.parents[0]].criterion.metric
        assert child.size >= parent.size + 2
    with pytest.raises(AssertionError, match="predicted"):
        records_of(replace(BROODS, exploration=0.5, variation=factors))


# Groups


def groups_of_parents(record: Record, records: list[Record]) -> set[str]:
    return {records[parent].criterion.group for parent in record.candidate.parents}


def children_of(records: list[Record]) -> list[Record]:
    return [record for record in records if record.candidate.parents]


def test_evolution_without_regroup_gives_a_child_the_group_of_one_of_its_parents():
    records = records_of(replace(GROUPED, regroup=0.0, candidates=120))
    children = children_of(records)
    assert len(children) > 50
    assert all(child.criterion.group in groups_of_parents(child, records) for child in children)
    mixed = [child for child in children if len(groups_of_parents(child, records)) == 2]
    firsts = [records[child.candidate.parents[0]] for child in mixed]
    from_first = {
        child.criterion.group == parent.criterion.group
        for child, parent in zip(mixed, firsts, strict=True)
    }
    assert from_first == {True, False}


def test_evolution_with_regroup_1_gives_a_child_another_group_wherever_there_is_one():
    records = records_of(replace(GROUPED, regroup=1.0, candidates=120))
    children = children_of(records)
    assert len(children) > 50
    assert not any(child.criterion.group in groups_of_parents(child, records) for child in children)


def test_evolution_takes_a_parents_text_under_another_group_for_a_child():
    records = records_of(replace(GROUPED, variation=STILL, regroup=1.0, candidates=120))
    children = children_of(records)
    assert len(children) > 20
    for child in children:
        assert child.criterion.text == records[child.candidate.parents[0]].criterion.text
        assert child.criterion.group not in groups_of_parents(child, records)


def test_evolution_with_one_group_gives_every_candidate_that_group():
    seeds = tuple(Criterion(seed.metric, "model") for seed in SEEDS)
    settings = replace(SETTINGS, groups=("model",), seeds=seeds, regroup=1.0, within=1.0)
    records = records_of(settings)
    assert {record.criterion.group for record in records} == {"model"}
    assert children_of(records)


def test_evolution_draws_the_groups_of_random_trees():
    records = records_of(replace(GROUPED, seeds=(), rules=Rules(capacity=60)))
    counts = Counter(record.criterion.group for record in records)
    assert counts.keys() == set(GROUPED.groups)
    assert min(counts.values()) >= 10


def test_evolution_within_1_mates_members_of_one_group_wherever_it_has_two():
    rules = Rules(capacity=12, kept=4)
    records = records_of(replace(GROUPED, within=1.0, candidates=120, rules=rules))
    mixed = 0
    for record in children_of(records):
        population = state_after(records[: record.index], rules).population
        members = Counter(member.criterion.group for member in population)
        one, other = (records[parent].criterion.group for parent in record.candidate.parents)
        mixed += one != other
        assert one == other or min(members[group] for group in GROUPED.groups) < 2
    assert mixed < 5
    firsts = [record.candidate.parents[0] for record in children_of(records)]
    assert {records[parent].criterion.group for parent in firsts} == set(GROUPED.groups)


# Random search, a new population


@pytest.mark.parametrize("groups", [("row",), GROUPED.groups])
def test_evolution_without_crossover_mutation_and_regroup_is_random_search(groups):
    settings = replace(
        GROUPED, groups=groups, variation=STILL, regroup=0.0, within=0.5, candidates=200
    )
    records = records_of(settings)
    assert children_of(records) == []
    assert len({record.criterion for record in records}) > 100


def test_evolution_begins_each_population_with_random_trees():
    records = journal(0, "full")
    began = sorted({step.state.began for step in whole(0, "full")})
    assert len(began) > 2
    for start in began:
        assert children_of(records[start : start + FULL.rules.capacity]) == []
        later = [min(child.candidate.parents) for child in children_of(records[start:])]
        assert all(parent >= start for parent in later)
    assert children_of(records[began[1] : began[2]])


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolution_lets_no_child_of_a_given_up_population_into_the_next(lag):
    for step in whole(lag, "full"):
        for member in step.state.population:
            oldest = min(member.candidate.parents, default=member.index)
            assert oldest >= step.state.began


# Thresholds of seeds


def test_evolution_fixes_the_threshold_of_a_seed_too_once_the_population_is_full():
    texts = ("W", "G", "log(W)", "log(G)", "exp(W)", "exp(G)", "tanh(W)")
    seeds = tuple(Criterion.parse(text, "row") for text in texts)
    settings = replace(SETTINGS, seeds=seeds, rules=Rules(capacity=2), candidates=7)
    records, search = searched(settings)
    limits = []
    for candidate in search.submitted:
        before = [r.fitness for r in records[: candidate.index] if r.fitness is not None]
        limits.append(sorted(before)[1] if len(before) > 1 else None)
    assert [candidate.stop_above for candidate in search.submitted] == limits
    assert limits[-1] is not None
