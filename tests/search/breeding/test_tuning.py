"""What numbers a metric has, what becomes of it with others, and what CMA-ES makes of samples."""

from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_metrics import random_terminals
from toy_records import never

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding.factors import MOST, factors_for
from prunevolve.search.breeding.product import factors_of
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.tuning import PATIENCE, UNTUNED, Genes, Tuning
from prunevolve.search.breeding.variation import Breeder, seeded
from prunevolve.search.evolution import State
from prunevolve.search.records import Candidate, Outcome, Record

DIRECTED = named_metric("directed-snip-wanda").metric
TABLE = factors_for(TERMINALS, "model")
SIGNED = "divrms(M, M)"


@pytest.mark.parametrize(
    ("metric", "numbers", "made"),
    [
        ("mul(mul(W, G), I)", [0.5], "mul(power(I, 1.5), mul(W, G))"),
        ("mul(mul(W, G), exp(D))", [-1.4], "mul(exp(mul(-0.4, D)), mul(W, G))"),
        ("mul(mul(W, G), exp(mul(0.3, D)))", [0.123], "mul(exp(mul(0.42, D)), mul(W, G))"),
        # One number, wherever in the exponential it stands.
        (
            "mul(mul(W, G), exp(mul(D, mul(0.3, I))))",
            [0.0, 0.0, 0.123],
            "mul(exp(mul(0.42, mul(D, I))), mul(W, G))",
        ),
        ("quot(mul(W, G), sqrt(I))", [0.2], "quot(mul(W, G), power(I, 0.3))"),
        ("mul(mul(W, G), I)", [-0.98], "mul(W, G)"),
        # A constant inside keeps its sign, and two digits.
        (f"mul(quot(W, W), tanh(mul(-0.5, {SIGNED})))", [0.3], f"tanh(mul(-0.67, {SIGNED}))"),
    ],
)
def test_numbers_of_a_metric_move_as_worked_by_hand(metric, numbers, made):
    genes = Genes(Metric.parse(metric), (), True)
    assert genes.count == len(numbers)
    assert genes.make(np.array(numbers)).text == made


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 2**31))
def test_any_metric_keeps_its_units_and_its_scores_while_nothing_moves(seed, key):
    with seeded(seed):
        metric = Breeder(Search(initial_depth=(1, 3)), "model").varied.random()
    genes = Genes(metric, TABLE, True)
    same = genes.make(np.zeros(genes.count))
    before, after = (x.score(**random_terminals(6, 8)) for x in (metric, same))
    assume(before.isfinite().all() and after.isfinite().all())
    # Up to a factor, which does not matter to a mask.
    ratio = after / before
    assume(ratio.isfinite().all() and before.abs().min() > 1e-6)
    first = torch.full_like(ratio, ratio.flatten()[0].item())
    torch.testing.assert_close(ratio, first, rtol=0.01, atol=0)  # mms and sub lose digits
    other = genes.make(np.random.default_rng(key).normal(0, 0.3, genes.count))
    assume(not other.problem)  # it is not taken, then
    assert other.is_comparable
    assert not simplify(Criterion(other, "model")).metric.problem


# The strategy


def child(index, numbers=(), loss=0.0, start=0):
    kind = "sampled" if numbers else "evaluated"
    outcome = Outcome(kind, None if numbers else loss, 1, "", loss, (loss,))
    metric = Criterion.parse(f"mul(G, power(W, {index + 2}))", "model")
    return Record(Candidate(index, metric, (start,), tuned=True, numbers=tuple(numbers)), outcome)


def plain(index, loss, metric="mul(W, G)"):
    candidate = Candidate(index, Criterion.parse(metric, "model"))
    return Record(candidate, Outcome("evaluated", loss, 1, rises=(loss,)))


def asked(tuning, index, lag=0, table=()):
    return tuning.ask(index, Search(seed=7, lag=lag), table, True)


def generations(loss, count, lag=0):
    """Return the tuning after so many generations of samples, each with the loss of its numbers."""
    start = Record(Candidate(0, named_metric("directed-snip-wanda")), Outcome("evaluated", 1.0))
    tuning, states, index, means = Tuning(start, 1 + lag), [], 1, 0
    while means <= count // 2:
        states.append(tuning)
        if index >= tuning.first and (candidates := asked(states[index - 1 - lag], index, lag)):
            numbers = candidates[0].numbers
            means += not numbers
            record = child(index, numbers, loss(np.array(numbers)) if numbers else 0.0)
            tuning = tuning.tell(record, (), 0.0, Search(lag=lag))
        index += 1
    return tuning


@pytest.mark.parametrize("lag", [0, 4, 64])
def test_tuning_moves_to_where_samples_are_better(lag):
    goal = np.array([0.6, -0.4, 0.5])
    tuning = generations(lambda numbers: float(np.square(numbers - goal).sum()), 30, lag)
    assert np.abs(tuning._mean(Genes(DIRECTED, (), True), lag) - goal).max() < 0.1
    # What is asked follows from the records alone, and a draw from its index alone.
    assert asked(replace(tuning), 901, lag) == asked(tuning, 901, lag)
    assert asked(tuning, 902, lag)[0].numbers != asked(tuning, 901, lag)[0].numbers


def test_one_candidate_in_four_is_bred_and_all_are_while_nothing_is_tuned():
    tuning = Tuning(plain(0, 0.9, "mul(mul(W, G), I)"), 1)
    assert [bool(asked(tuning, index)) for index in range(4, 9)] == [False, *[True] * 3, False]
    assert asked(Tuning(), 5) == []


def test_tuning_adds_the_tables_factors_unless_there_are_as_many_as_may_be():
    free = [f"divrms({x}, {x})" for x in ("X", "V", "H", "sqr(X)", "sqr(V)")]
    for count in (4, 5):
        start = plain(0, 0.9, reduce("mul({}, {})".format, free[:count], "mul(W, G)"))
        (sample, *_) = asked(Tuning(start, first=1), 2, table=TABLE)
        own, bases = (set(factors_of(x.criterion.metric)) for x in (start, sample))
        assert len(own) == count + 2
        assert (bases == own) == (len(own) == MOST)


def test_a_tuned_child_can_be_read_back_whatever_exponents_become_0():
    inner = "colmax(mul(power(quot(W, rowmean(W)), 0.1), power(divrms(X, X), 0.2)))"
    tuning = Tuning(plain(5, 0.5, f"mul(mul(W, G), divrms({inner}, {inner}))"), 1)
    children = [sample for index in range(1, 200) for sample in asked(tuning, index, table=TABLE)]
    assert not any(sample.criterion.metric.problem for sample in children)
    assert len({sample.criterion.text for sample in children}) > 100


# When the tuning of a metric begins and ends


def test_state_tunes_the_best_and_then_the_best_that_was_not():
    search, state = Search(population=2, primitives="extended"), State()
    for index, loss in enumerate((0.9, 0.8, 0.7, *[0.95] * 3)):
        assert not state.tuning.start
        state = state.commit(plain(index, loss), search, never)
    assert (UNTUNED, state.tuning) == (3, Tuning(plain(2, 0.7), 6 + search.lag))
    of_another, sample = child(6, (0.1,), start=1), child(7, (0.1,), 0.1, start=2)
    state = state.commit(of_another, search, never).commit(sample, search, never)
    assert state.tuning.children == (sample,)
    for index in range(8, 8 + PATIENCE):
        assert state.tuning.start == plain(2, 0.7)
        state = state.commit(child(index, loss=0.99, start=2), search, never)
    assert state.tuning == Tuning(plain(1, 0.8), 8 + PATIENCE + search.lag, done=(2,))


def test_tuning_begins_after_the_seeds_and_never_with_the_releases_set():
    seeded = Search(population=2, seeds=["wanda", "snip"])
    assert State().commit(plain(0, 0.9), seeded, never).tuning == Tuning()
    begun = State(1).commit(plain(1, 0.8), seeded, never).tuning
    assert begun == Tuning(plain(1, 0.8), 2 + seeded.lag)
    release = Search(population=2, primitives="release")
    assert State(6).commit(plain(6, 0.1), release, never).tuning == Tuning()
