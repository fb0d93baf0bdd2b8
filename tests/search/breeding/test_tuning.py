"""What numbers a metric has, what becomes of it with others, and what CMA-ES makes of samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prunevolve.configs.schema import Search
from prunevolve.pruning.metric import Criterion, Metric
from prunevolve.pruning.parse import named_metric
from prunevolve.pruning.statistics import TERMINALS
from prunevolve.search.breeding import tuning as tuning_module
from prunevolve.search.breeding.factors import factors_for
from prunevolve.search.breeding.simplify import simplify
from prunevolve.search.breeding.tuning import (
    LEAST,
    SAMPLES,
    draw,
    genes_of,
    is_tuned,
    mean_of,
    place_of,
)
from prunevolve.search.breeding.variation import Breeder, seeded
from prunevolve.search.population import PATIENCE, UNTUNED, State, Tuning
from prunevolve.search.records import Candidate, Outcome, Record

DIRECTED = named_metric("directed-snip-wanda").metric
TABLE = factors_for(TERMINALS, "model")


SIGNED = "divrms(M, M)"


def terminals():
    generator = torch.Generator().manual_seed(0)
    sizes = {
        name: (6 if terminal.shape.by_row else 1, 8 if terminal.shape.by_column else 1)
        for name, terminal in TERMINALS.items()
    }
    return {name: torch.rand(size, generator=generator) + 0.1 for name, size in sizes.items()}


def moved(metric, numbers):
    genes = genes_of(Metric.parse(metric), (), True)
    assert genes.count == len(numbers)
    return genes.make(np.array(numbers)).text


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
        (
            "quot(mul(W, G), sqrt(I))",
            [0.2],
            "quot(mul(W, G), power(I, 0.3))",
        ),
        ("mul(mul(W, G), I)", [-0.98], "mul(W, G)"),
        # A constant inside keeps its sign, and two digits.
        (f"mul(quot(W, W), tanh(mul(-0.5, {SIGNED})))", [0.3], f"tanh(mul(-0.67, {SIGNED}))"),
    ],
)
def test_numbers_of_a_metric_move_as_worked_by_hand(metric, numbers, made):
    assert moved(metric, numbers) == made


def test_units_stay_and_without_them_every_exponent_moves():
    bound = genes_of(Metric.parse("mul(W, G)"), (), True)
    assert bound.count == 0  # w^1 w^-1: neither can move alone
    # The first stays, since a power of the whole changes nothing.
    assert genes_of(Metric.parse("mul(W, G)"), (), False).count == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 2**31))
def test_any_metric_keeps_its_units_and_its_scores_while_nothing_moves(seed, key):
    with seeded(seed):
        metric = Breeder(Search(initial_depth=(1, 3)), "model").varied.random()
    genes = genes_of(metric, TABLE, True)
    same = genes.make(np.zeros(genes.count))
    before, after = metric.score(**terminals()), same.score(**terminals())
    assume(before.isfinite().all() and after.isfinite().all())
    # Up to a factor, which does not matter to a mask.
    ratio = after / before
    assume(ratio.isfinite().all() and before.abs().min() > 1e-6)
    first = torch.full_like(ratio, ratio.flatten()[0].item())
    torch.testing.assert_close(ratio, first, rtol=0.01, atol=0)  # mms and sub lose digits
    other = genes.make(np.random.default_rng(key).normal(0, 0.3, genes.count))
    assert other.is_comparable
    assert not simplify(Criterion(other, "model")).metric.problem


def test_exponents_near_0_leave_the_factor_out():
    genes = genes_of(Metric.parse("mul(W, G)"), TABLE, True)
    assert genes.count == len(TABLE)
    assert genes.make(np.full(genes.count, 0.7 * LEAST)).text == "mul(W, G)"
    assert len(list(genes.make(np.full(genes.count, 1.3 * LEAST)).nodes())) > 50


# The strategy


def child(index, numbers=(), loss=0.0, start=0):
    kind = "sampled" if numbers else "evaluated"
    outcome = Outcome(kind, None if numbers else loss, 1, "", loss, (loss,))
    metric = Criterion.parse(f"mul(G, power(W, {index + 2}))", "model")
    return Record(Candidate(index, metric, (start,), tuned=True, numbers=tuple(numbers)), outcome)


def generations(genes, loss, count, lag=0):
    """Return the tuning after so many generations of samples, each with the loss of its numbers."""
    tuning, states, index = Tuning(child(0), 1 + lag), [], 1
    while index < 1 + lag or place_of(index, tuning, lag)[0] < count:
        states.append(tuning)
        seen = states[max(0, index - 1 - lag)]
        if index >= tuning.first and is_tuned(index):
            is_mean = place_of(index, tuning, lag)[1]
            numbers = mean_of(genes, seen, lag) if is_mean else draw(genes, seen, lag, 7, index)
            tuning = tuning.add(child(index, () if is_mean else numbers.tolist(), loss(numbers)))
        index += 1
    return tuning


def test_mean_is_that_over_the_last_generations(monkeypatch):
    genes = genes_of(DIRECTED, (), True)
    tuning = generations(genes, lambda numbers: float(numbers[0]), 4)
    samples = [record for record in tuning.children if record.candidate.numbers]
    mean = mean_of(genes, tuning, 0)
    monkeypatch.setattr(tuning_module, "AVERAGED", 1)
    each = [
        mean_of(genes, replace(tuning, children=tuple(samples[:end])), 0)
        for end in range(0, len(samples) + 1, SAMPLES)
    ]
    assert len(each) == 5
    assert not each[0].any()
    np.testing.assert_allclose(mean, np.mean(each[-3:], axis=0))


@pytest.mark.parametrize("lag", [0, 4, 64])
def test_strategy_moves_to_where_samples_are_better(lag):
    genes = genes_of(DIRECTED, (), True)
    goal = np.array([0.6, -0.4, 0.5])
    tuning = generations(genes, lambda numbers: float(np.square(numbers - goal).sum()), 30, lag)
    assert np.abs(mean_of(genes, tuning, lag) - goal).max() < 0.1
    # It follows from the records alone, and a draw from its key alone.
    again = replace(tuning)
    assert draw(genes, again, lag, 7, 900).tolist() == draw(genes, tuning, lag, 7, 900).tolist()
    assert draw(genes, again, lag, 7, 902).tolist() != draw(genes, tuning, lag, 7, 900).tolist()


@pytest.mark.parametrize("lag", [0, 1, 5, 8, 12, 256])
@pytest.mark.parametrize("begun", [1, 2, 3, 4])
def test_mean_comes_as_soon_as_its_generations_outcomes_are_known(lag, begun):
    tuning = Tuning(child(0), begun + lag)
    tuned = [i for i in range(tuning.first, tuning.first + 3000) if is_tuned(i)]
    places = {index: place_of(index, tuning, lag) for index in tuned}
    samples = {}
    for index, (generation, is_mean) in places.items():
        if not is_mean:
            samples.setdefault(generation, []).append(index)
    assert {len(of) for of in list(samples.values())[:-1]} == {len(samples[0])}
    assert len(samples[0]) >= SAMPLES
    means = {generation: index for index, (generation, is_mean) in places.items() if is_mean}
    for generation, index in list(means.items())[1:-1]:
        last = max(samples[generation - 1])
        assert 0 <= (index - lag - 1) - last <= 3


def test_draw_leaves_numpys_generator_as_it_was():
    np.random.seed(3)
    expected = np.random.random(2).tolist()
    np.random.seed(3)
    first = np.random.random()
    draw(genes_of(DIRECTED, (), True), Tuning(child(0), 1), 0, 1)
    assert [first, np.random.random()] == expected


# When a tuning begins and ends


def test_tuning_takes_its_own_children_and_ends_when_its_means_fall_behind():
    tuning = Tuning(child(0), 1)
    assert tuning.add(child(4, (0.1,), start=2)) is tuning
    for index in range(PATIENCE):
        assert not tuning.lags_behind(0.5)
        tuning = tuning.add(child(2 * index + 2, loss=0.6))
        tuning = tuning.add(child(2 * index + 3, (0.1,), loss=0.1))
    assert tuning.lags_behind(0.5)
    assert not tuning.lags_behind(0.6)


def test_state_tunes_the_best_and_then_the_best_that_was_not():
    search, state = Search(population=2, primitives="extended"), State()
    for index, loss in enumerate((0.9, 0.8, 0.7, *[0.95] * 3)):
        assert not state.tuning
        state = state.commit(plain(index, loss), search)
    assert (UNTUNED, state.tuning) == (3, Tuning(plain(2, 0.7), 6 + search.lag))
    for index in range(6, 6 + PATIENCE):
        state = state.commit(child(index, loss=0.99, start=2), search)
    assert state.tuned == (2,)
    assert state.tuning == Tuning(plain(1, 0.8), 6 + PATIENCE + search.lag)
    seeded = search.model_copy(update={"seeds": ["wanda", "snip"]})
    assert State().commit(plain(0, 0.9), seeded).tuning is None
    assert State(1).commit(plain(1, 0.8), seeded).tuning == Tuning(plain(1, 0.8), 2 + search.lag)
    release = search.model_copy(update={"primitives": "release"})
    assert State(6, state.population).commit(plain(6, 0.1), release).tuning is None


def plain(index, loss):
    return Record(
        Candidate(index, child(index).criterion), Outcome("evaluated", loss, 1, rises=(loss,))
    )
