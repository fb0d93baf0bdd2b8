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

from pruning.masks import DegenerateScores
from pruning.metric import Metric
from search.breeding.primitives import primitive_set
from search.breeding.variation import Variation
from search.evolution import Settings, evolve
from search.population import Candidate, Outcome, Record, Rules, State

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
SEEDS = tuple((Metric.parse(text), "row") for text in ("mul(W, sqrt(X))", "mul(W, W)", "W"))
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
    variation=VARIATION,
)


def near(one: Candidate | Record, other: Record) -> bool:
    """Nearly equal masks: neighbouring marks of `mark_of`."""
    assert one.fingerprint
    assert other.fingerprint
    return abs(int(one.fingerprint) - int(other.fingerprint)) <= 12


GROUPED = replace(SETTINGS, groups=("row", "layer", "model"), regroup=0.2, within=0.25)
FULL = replace(
    GROUPED,
    candidates=160,
    rules=Rules(capacity=7, resolution=0.05, near=near, kept=2, patience=20, lag=7),
)
"""Everything switched on."""

KINDS = {"plain": SETTINGS, "full": FULL}
STILL = replace(VARIATION, crossover=0, mutation=0)
"""Children that are their first parent."""

CUTS = [("plain", cut) for cut in (1, 3, 6, 7, 8, 9, 30, 59, 60)]
CUTS += [("full", cut) for cut in (1, 7, 9, 30, *range(40, 160, 8), 159, 160)]

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
    """Shorter texts are fitter, more or less; one group is not; some fail, some are stopped."""
    number = digits(f"{candidate.group} {candidate.metric}")
    if number % 11 == 0:
        return Outcome("failed", reason="out of memory")
    behind = 0.5 if candidate.group == "layer" else 0
    fitness = 3 + len(candidate.metric) / 40 + number % 100 / 100 + behind
    if candidate.stop_above is not None and fitness > 1.2 * candidate.stop_above:
        return Outcome("stopped", tokens=10, reason=f"above {candidate.stop_above}")
    return Outcome("evaluated", fitness, 100)


def mark_of(metric: str, group: str) -> str:
    """A mask fingerprint that some formulas share and some have none of."""
    if digits(metric) % 7 == 0:
        raise DegenerateScores(f"'{metric}' is constant")
    return f"{digits(f'{group} {metric}') % 397:03}"


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


def with_lag(settings: Settings, lag: int) -> Settings:
    return replace(settings, rules=replace(settings.rules, lag=lag))


@cache
def whole(lag: int = 7, kind: str = "plain") -> list[tuple[Record, State, State]]:
    """The uninterrupted run, outcomes in order of submission."""
    return run(with_lag(KINDS[kind], lag))


def state_after(records: Iterable[Record], rules: Rules = SETTINGS.rules) -> State:
    state = State()
    for record in records:
        state = state.commit(record, rules)
    return state


def submitted(settings: Settings, pick: Pick = first) -> tuple[list[Record], list[Candidate]]:
    """The records of a run, and the candidates that it had evaluated."""
    evaluations = Evaluations(pick)
    steps = list(evolve(settings, mark_of, evaluations, State(), []))
    return records_of(steps), evaluations.submitted


# The same journal, however the workers race and wherever the run was cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(
    "pick", [last, shuffled(3), racing(4), racing(5, workers=20)], ids=["lifo", "random", "3", "20"]
)
def test_evolve_gives_the_same_records_whatever_the_order_of_arrival(lag, pick, kind):
    assert run(with_lag(KINDS[kind], lag), pick) == whole(lag, kind)


@pytest.mark.parametrize(("kind", "cut"), [("plain", 0), *CUTS])
def test_evolve_resumed_from_nothing_but_records_equals_uninterrupted(kind, cut):
    records = records_of(whole(kind=kind))
    assert run(KINDS[kind], racing(cut), State(), records[:cut]) == whole(kind=kind)[cut:]


@pytest.mark.parametrize("lag", [0, 1, 7])
@pytest.mark.parametrize(("kind", "cut"), CUTS)
def test_evolve_resumed_from_the_resumable_state_equals_uninterrupted(kind, cut, lag):
    records = records_of(whole(lag, kind))
    _, _, resumable = whole(lag, kind)[cut - 1]
    assert resumable.committed == max(0, cut - lag)
    again = run(with_lag(KINDS[kind], lag), last, resumable, records[:cut])
    assert again == whole(lag, kind)[cut:]


@examples(max_examples=30, deadline=None, derandomize=True)
@given(
    *(st.floats(0, 1), st.integers(0, 159), st.integers(0, 20), st.integers(0, 99)),
    st.sampled_from(list(KINDS)),
)
def test_evolve_resumed_from_an_older_checkpoint_equals_uninterrupted(
    share, earlier, lag, seed, kind
):
    steps, records = whole(lag, kind), records_of(whole(lag, kind))
    cut = 1 + round(share * (len(steps) - 1))
    _, _, resumable = steps[min(cut, earlier + 1) - 1]
    again = run(with_lag(KINDS[kind], lag), racing(seed), resumable, records[:cut])
    assert again == steps[cut:]


@pytest.mark.parametrize("lag", [0, 7])
def test_evolve_with_everything_on_has_every_rule_at_work(lag):
    """Else the tests above would say nothing about the rules."""
    steps = whole(lag, "full")
    rules = with_lag(FULL, lag).rules
    assert steps[-1][1].began > 0
    assert {record.group for record in records_of(steps)} == set(FULL.groups)
    off = {"resolution": 0.0, "near": SETTINGS.rules.near, "kept": 0, "patience": None}
    for rule, without in off.items():
        settings = replace(FULL, rules=replace(rules, **{rule: without}))
        assert records_of(run(settings)) != records_of(steps), rule


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
    records, asked = submitted(SETTINGS)
    degenerate = [record for record in records if record.outcome == "degenerate"]
    for record in degenerate:
        assert record.reason == f"'{record.metric}' is constant"
        assert record.fingerprint is None
    evaluated = {r.index for r in records if r.outcome in ("evaluated", "stopped", "failed")}
    assert degenerate
    assert {candidate.index for candidate in asked} == evaluated


def test_evolve_without_fingerprints_knows_candidates_by_their_text_alone():
    steps = list(evolve(SETTINGS, None, Evaluations(first), State(), []))
    records = records_of(steps)
    assert {record.fingerprint for record in records} == {None}
    assert {record.reason[:9] for record in records if record.outcome == "duplicate"} == {
        "same text"
    }
    assert "degenerate" not in {record.outcome for record in records}


@pytest.mark.parametrize("mark", [None, mark_of])
def test_evolve_takes_one_text_under_two_groups_for_two_candidates(mark):
    text = Metric.parse("mul(W, G)")
    seeds = ((text, "row"), (text, "layer"), (text, "row"), (text, "model"))
    settings = replace(GROUPED, seeds=seeds, candidates=4)
    records = records_of(list(evolve(settings, mark, Evaluations(first), State(), [])))
    assert [record.group for record in records] == ["row", "layer", "row", "model"]
    assert [record.reason for record in records] == ["", "", "same text as 0", ""]


def test_evolve_brings_a_metric_to_the_canonical_form_of_its_group():
    seeds = tuple((Metric.parse("mms(W)"), group) for group in ("model", "row", "layer"))
    settings = replace(GROUPED, seeds=seeds, candidates=3)
    texts = [(record.metric, record.group) for record in records_of(run(settings))]
    assert texts == [("mms(W)", "model"), ("W", "row"), ("W", "layer")]


def test_evolve_leaves_texts_as_they_were_bred_if_not_to_be_simplified():
    records = records_of(run(replace(SETTINGS, simplified=False)))
    assert [record.metric for record in records[:3]] == ["mul(W, sqrt(X))", "mul(W, W)", "W"]


# Breeding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolve_breeds_from_exactly_the_outcomes_that_the_lag_lets_it_wait_for(lag, kind):
    settings = with_lag(KINDS[kind], lag)
    records, asked = submitted(settings, racing(1, workers=20))
    bred_from = [
        state_after(records[: max(0, i - lag)], settings.rules) for i in range(len(records))
    ]
    for candidate in asked:
        state = bred_from[candidate.index]
        like = [m.fitness for m in state.population if settings.rules.near(candidate, m)]
        expected = min(like) if like else state.worst_fitness(candidate.group, settings.rules)
        assert candidate.stop_above == expected
        assert set(candidate.parents) <= {member.index for member in state.population}
    assert asked[0].stop_above is None
    assert any(candidate.stop_above is not None for candidate in asked[30:])
    assert any(candidate.parents for candidate in asked)


def test_evolve_stops_above_exactly_what_would_not_enter_the_population():
    rules = replace(FULL.rules, resolution=0.0, patience=None, lag=0)
    records, asked = submitted(replace(FULL, rules=rules))
    limits = 0
    for candidate in asked:
        state = state_after(records[: candidate.index], rules)
        for step in (-1e-6, 1e-6):
            limit = 9.0 if candidate.stop_above is None else candidate.stop_above
            record = Record.of(candidate, Outcome("evaluated", limit + step))
            entered = record in state.commit(record, rules).population
            assert entered == (candidate.stop_above is None or step < 0)
            limits += candidate.stop_above is not None
    assert limits > 20


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolve_submits_as_soon_as_the_lag_allows_and_no_sooner(lag):
    committed = 0
    seen: list[tuple[int, int]] = []

    class Watched(Evaluations):
        def submit(self, candidate: Candidate) -> None:
            seen.append((candidate.index, committed))
            super().submit(candidate)

    for _ in evolve(with_lag(SETTINGS, lag), mark_of, Watched(last), State(), []):
        committed += 1
    assert [at for _, at in seen] == [max(0, index - lag) for index, _ in seen]


def test_evolve_breeds_children_of_two_different_members_once_there_is_a_population():
    records = records_of(run(replace(SETTINGS, rules=Rules(capacity=20))))
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
    def all_degenerate(metric: str, group: str) -> str:
        raise DegenerateScores("no")

    steps = list(evolve(SETTINGS, all_degenerate, Evaluations(first), State(), []))
    assert {record.outcome for record, _, _ in steps} == {"degenerate", "duplicate"}
    assert {record.parents for record, _, _ in steps} == {()}
    assert steps[-1][1] == State(60)


def test_evolve_does_not_take_a_mistake_for_a_degenerate_metric():
    def broken(metric: str, group: str) -> str:
        raise ValueError("pattern must divide the inputs")

    with pytest.raises(ValueError, match="pattern must divide the inputs"):
        list(evolve(SETTINGS, broken, Evaluations(first), State(), []))


# Groups


def groups_of_parents(record: Record, records: list[Record]) -> set[str]:
    return {records[parent].group for parent in record.parents}


def test_evolve_without_regroup_gives_a_child_the_group_of_one_of_its_parents():
    records = records_of(run(replace(GROUPED, regroup=0.0, candidates=120)))
    children = [record for record in records if record.parents]
    assert len(children) > 50
    assert all(child.group in groups_of_parents(child, records) for child in children)
    mixed = [child for child in children if len(groups_of_parents(child, records)) == 2]
    from_first = [child.group == records[child.parents[0]].group for child in mixed]
    assert {True, False} == set(from_first)


def test_evolve_with_regroup_1_gives_a_child_another_group_wherever_there_is_one():
    records = records_of(run(replace(GROUPED, regroup=1.0, candidates=120)))
    children = [record for record in records if record.parents]
    assert len(children) > 50
    assert not any(child.group in groups_of_parents(child, records) for child in children)


def test_evolve_takes_a_parents_text_under_another_group_for_a_child():
    settings = replace(GROUPED, variation=STILL, regroup=1.0, candidates=120)
    records = records_of(run(settings))
    children = [record for record in records if record.parents]
    assert len(children) > 20
    for child in children:
        assert child.metric == records[child.parents[0]].metric
        assert child.group not in groups_of_parents(child, records)


def test_evolve_with_one_group_gives_every_candidate_that_group():
    seeds = tuple((metric, "model") for metric, _ in SEEDS)
    settings = replace(SETTINGS, groups=("model",), seeds=seeds, regroup=1.0, within=1.0)
    records = records_of(run(settings))
    assert {record.group for record in records} == {"model"}
    assert any(record.parents for record in records)


def test_evolve_draws_the_groups_of_random_trees():
    records = records_of(run(replace(GROUPED, seeds=(), rules=Rules(capacity=60))))
    counts = Counter(record.group for record in records)
    assert counts.keys() == set(GROUPED.groups)
    assert min(counts.values()) >= 10


def test_evolve_within_1_mates_members_of_one_group_wherever_it_has_two():
    settings = replace(GROUPED, within=1.0, candidates=120, rules=Rules(capacity=12, kept=4))
    steps = run(settings)
    records = records_of(steps)
    mixed = 0
    for record in records:
        if record.parents:
            members = Counter(member.group for member in steps[record.index - 1][1].population)
            one, other = (records[parent].group for parent in record.parents)
            mixed += one != other
            assert one == other or min(members.get(group, 0) for group in GROUPED.groups) < 2
    assert mixed < 5
    assert len({records[record.parents[0]].group for record in records if record.parents}) == 3


# Random search, a new population


@pytest.mark.parametrize("groups", [("row",), GROUPED.groups])
def test_evolve_without_crossover_mutation_and_regroup_is_random_search(groups):
    settings = replace(
        GROUPED, groups=groups, variation=STILL, regroup=0.0, within=0.5, candidates=200
    )
    records = records_of(run(settings))
    assert {record.parents for record in records} == {()}
    assert len({(record.metric, record.group) for record in records}) > 100


def test_evolve_begins_each_population_with_random_trees():
    records = records_of(whole(0, "full"))
    rules = with_lag(FULL, 0).rules
    began = sorted({state.began for _, state, _ in whole(0, "full")})
    assert len(began) > 2
    for start in began:
        assert all(r.parents == () for r in records[start : start + rules.capacity])
        later = [min(r.parents) for r in records[start:] if r.parents]
        assert all(parent >= start for parent in later)
    assert any(record.parents for record in records[began[1] : began[2]])


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_evolve_lets_no_child_of_a_given_up_population_into_the_next(lag):
    for _, state, _ in whole(lag, "full"):
        assert all(min(m.parents, default=m.index) >= state.began for m in state.population)


# Thresholds of seeds, and an end


def test_evolve_fixes_the_threshold_of_a_seed_too_once_the_population_is_full():
    texts = ("W", "G", "log(W)", "log(G)", "exp(W)", "exp(G)", "tanh(W)")
    seeds = tuple((Metric.parse(text), "row") for text in texts)
    settings = replace(SETTINGS, seeds=seeds, rules=Rules(capacity=2), candidates=7)
    records, asked = submitted(settings)
    limits = []
    for candidate in asked:
        before = [r.fitness for r in records[: candidate.index] if r.fitness is not None]
        limits.append(sorted(before)[1] if len(before) > 1 else None)
    assert [candidate.stop_above for candidate in asked] == limits
    assert limits[-1] is not None


def test_evolve_stops_when_asked_with_what_was_committed():
    done: list[Record] = []
    evaluations = Evaluations(racing(2))
    loop = evolve(SETTINGS, mark_of, evaluations, State(), [], lambda: len(done) >= 20)
    for record, _, _ in loop:
        done.append(record)
    assert done == records_of(whole())[:20]
    assert max(candidate.index for candidate in evaluations.submitted) <= 19 + SETTINGS.rules.lag
