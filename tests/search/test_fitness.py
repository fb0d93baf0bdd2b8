"""An evaluator prunes, measures and restores, exactly, and decides as its stages say."""

from dataclasses import replace
from itertools import zip_longest
from math import sqrt

import pytest
import torch
from toy_models import assert_same_tensors, weights_of
from toy_setup import (
    CONSTANT,
    HALF,
    MAGNITUDE,
    NEGATIVE,
    ROLES,
    SNIP,
    TWO_OF_FOUR,
    WANDA,
    criterion_of,
    made_of,
    measure_scale,
    setup_of,
    words,
)

from prunevolve.evaluation.perplexity import window_losses
from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import load_model
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.recipe import Recipe
from prunevolve.pruning.store import ResidentStore
from prunevolve.pruning.stream import Texts
from prunevolve.search.evaluator import SLACK, Evaluator, Task
from prunevolve.search.population import Candidate
from prunevolve.search.resident import Subject

MOST = Task("most", 0, 0.7, None, 1.0)


def candidate(criterion, index=0, **more):
    return Candidate(index, criterion, **more)


@pytest.fixture(scope="module")
def evaluator():
    return made_of(setup_of())


@pytest.fixture(scope="module")
def on_two_models(tiny_llama_dir):
    """Three tasks: two on the embedded model, one on another with other texts."""
    other = Task("other", 1, 0.25, None, 2.0)
    generator = torch.Generator().manual_seed(0)
    noise = {role: torch.randint(3, 256, (3, 16), generator=generator) for role in ROLES}
    subjects = (Subject("embedded", "float32"), Subject(str(tiny_llama_dir), "float32"))
    tasks = (HALF, other, TWO_OF_FOUR)
    return made_of(setup_of(subjects=subjects, windows=(words(4), noise), tasks=tasks))


def again(evaluator, **changes):
    """Return an evaluator with other settings and the same statistics."""
    made = Evaluator(replace(evaluator.setup, **changes))
    for subject, resident in enumerate(evaluator.residents):
        made.use_statistics(subject, resident.statistics.to_tensors())
    measure_scale(made)
    return made


def rescaled(evaluator, *cells, **changes):
    """Give an evaluator's cells other values, and its scale other settings."""
    scale = evaluator.scale
    own = [
        cell.model_copy(update=update)
        for cell, update in zip_longest(scale.cells, cells, fillvalue={})
    ]
    evaluator.use_scale(scale.model_copy(update={"cells": tuple(own), **changes}))


def assert_dense(evaluator):
    for resident, subject in zip(evaluator.residents, evaluator.setup.subjects, strict=True):
        dense = load_model(subject.model, subject.dtype)
        assert_same_tensors(weights_of(resident.store.model), weights_of(dense))


def pruned(evaluator, task, criterion=WANDA):
    subject = evaluator.setup.subjects[task.subject]
    store = ResidentStore(load_model(subject.model, subject.dtype))
    calibration = evaluator.setup.windows[task.subject]["calibration"]
    prune(store, Recipe(criterion.metric, task.target(criterion.group)), Texts(calibration))
    return store


def rises_under_wanda(evaluator, task):
    """Return each fitness window's rise of NLL over dense, (N,), without the evaluator."""
    subject = evaluator.setup.subjects[task.subject]
    windows = evaluator.setup.windows[task.subject]["fitness"]
    dense = window_losses(ResidentStore(load_model(subject.model, subject.dtype)), windows)
    return window_losses(pruned(evaluator, task), windows) - dense


@pytest.mark.parametrize(
    ("criterion", "limit", "kind", "reason"),
    [
        (WANDA, None, "evaluated", ""),
        (NEGATIVE, 0.0, "stopped", "relative rise"),
        (CONSTANT, None, "degenerate", "scores of 'sub(W, W)' are constant"),
        (criterion_of("exp(exp(exp(mul(W, X))))"), None, "degenerate", "are not finite"),
    ],
    ids=str,
)
def test_evaluate_restores_every_weights_bits(on_two_models, criterion, limit, kind, reason):
    staged = again(on_two_models, stages=(1,))
    outcome = staged.evaluate(candidate(criterion, best=limit, enter=limit))
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert_dense(staged)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (criterion_of("W", "column"), "group must be one of row, layer, model, got 'column'"),
        (criterion_of("mul(W, M)"), r"metric 'mul\(W, M\)' uses M, and M is None: pass it"),
    ],
    ids=str,
)
def test_mistake_is_no_fault_of_the_metric(evaluator, criterion, message):
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(candidate(criterion))
    with pytest.raises(ValueError, match=message):
        evaluator.losses(0, "report", criterion)
    assert_dense(evaluator)


def test_fitness_of_several_tasks_is_the_mean_of_their_relative_rises_by_weight(on_two_models):
    half, other, two_of_four = (
        rises_under_wanda(on_two_models, task).mean().item() / cell.rise
        for task, cell in zip(on_two_models.setup.tasks, on_two_models.scale.cells, strict=True)
    )
    outcome = on_two_models.evaluate(candidate(WANDA))
    expected = (1 * half + 2 * other + 3 * two_of_four) / 6
    assert outcome.fitness == pytest.approx(expected, rel=1e-6)
    assert outcome.tokens == 4 * 32 + 3 * 16 + 4 * 32


@pytest.mark.parametrize("bad_on", [0, 1, 2])
def test_stopped_on_one_task_costs_those_after_it_nothing(on_two_models, bad_on):
    staged = again(on_two_models, stages=(1,))
    hard = {"rise": 1e-9, "dense": (0.0,) * len(staged.scale.cells[bad_on].dense)}
    rescaled(staged, *(hard if task == bad_on else {"rise": 1e6} for task in range(3)))
    stopped = staged.evaluate(candidate(NEGATIVE, best=1.0, enter=2.0))
    tokens = (32, 16, 32)
    assert (stopped.kind, stopped.tokens) == ("stopped", sum(tokens[: bad_on + 1]))
    measured = [rise is not None for rise in stopped.rises]
    assert measured == [task <= bad_on for task in range(3)]
    assert stopped.reason.endswith(" above 2.0000")


def test_stages_that_do_not_stop_change_nothing_and_without_any_nothing_stops(on_two_models):
    staged = again(on_two_models, stages=(1, 2))
    by_layer = candidate(criterion_of("mul(W, G)", "layer"), best=1e9, enter=1e9)
    outcome = staged.evaluate(by_layer)
    assert on_two_models.evaluate(replace(by_layer, best=0.0, enter=0.0)) == outcome
    assert (outcome.kind, outcome.tokens) == ("evaluated", 4 * 32 + 3 * 16 + 4 * 32)


@pytest.mark.parametrize(("enter", "kind"), [(None, "evaluated"), (1e9, "evaluated")])
def test_who_is_clearly_not_the_best_but_can_enter_has_a_predicted_fitness(
    on_two_models, enter, kind
):
    staged = again(on_two_models, stages=(1,))
    full = staged.evaluate(candidate(NEGATIVE))
    ended = staged.evaluate(candidate(NEGATIVE, best=0.0, enter=enter))
    assert (full.kind, ended.kind) == ("evaluated", kind)
    assert ended.tokens == 32 + 16 + 32 < full.tokens
    assert ended.reason == "not to the end"
    losses = [staged.losses(task, "fitness", NEGATIVE)[:1] for task in range(3)]
    assert ended.fitness == pytest.approx(staged.scale.fitness(losses))
    assert ended.rises == pytest.approx(staged.scale.rises_by_task(losses))
    assert staged.evaluate(candidate(NEGATIVE, best=full.fitness * 10)) == full


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_stages_divide_the_rise_by_the_profile_and_give_slack_by_windows(evaluator, windows):
    staged = again(evaluator, stages=(windows,), tasks=(MOST,))
    rescaled(staged, {"shares": (2.0, 0.5, 0.8, 0.7), "rise": 0.5})
    share = {1: 2.0, 2: 1.25, 3: 1.1}[windows]
    rise = rises_under_wanda(staged, MOST)[:windows].mean().item() / share / 0.5
    best = rise / (1 + SLACK / sqrt(windows))
    for limit, kind in ((best - 1e-5, "stopped"), (best + 1e-5, "evaluated")):
        outcome = staged.evaluate(candidate(WANDA, best=limit, enter=limit))
        assert outcome.kind == kind
        assert outcome.tokens == 32 * (windows if kind == "stopped" else 4)
    ended = staged.evaluate(candidate(WANDA, best=best - 1e-5, enter=rise - 1e-5))
    assert (ended.kind, ended.fitness, ended.estimate) == ("stopped", None, pytest.approx(rise))
    assert ended.reason == f"relative rise {rise:.4f} above {rise - 1e-5:.4f}"
    ended = staged.evaluate(candidate(WANDA, best=best - 1e-5, enter=rise + 1e-5))
    assert (ended.kind, ended.fitness) == ("evaluated", pytest.approx(rise))


def test_losses_are_those_of_the_pruned_model_or_of_the_dense_one(on_two_models):
    for number, task in enumerate(on_two_models.setup.tasks):
        windows = on_two_models.setup.windows[task.subject]["selection"]
        for criterion in (SNIP, WANDA, MAGNITUDE):
            expected = window_losses(pruned(on_two_models, task, criterion), windows).tolist()
            assert on_two_models.losses(number, "selection", criterion) == pytest.approx(expected)
        subject = on_two_models.setup.subjects[task.subject]
        dense = window_losses(ResidentStore(load_model(subject.model, "float32")), windows)
        assert on_two_models.losses(number, "selection", None) == dense.tolist()
    assert_dense(on_two_models)


def test_losses_of_a_degenerate_metric_are_none(evaluator):
    assert evaluator.losses(0, "report", CONSTANT) is None
    assert_dense(evaluator)


def with_memory(low_memory):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = frozenset("XGM")
    return setup_of(windows=(words(3),), leaves=leaves, device=device, low_memory=low_memory)


@pytest.fixture(scope="module")
def plenty():
    return made_of(with_memory(False))


@pytest.mark.parametrize("group", ["row", "model"])
def test_scores_made_again_change_nothing(plenty, group):
    sparing = Evaluator(with_memory(True))
    sparing.use_statistics(0, plenty.residents[0].statistics.to_tensors())
    sparing.use_scale(plenty.scale)
    assert sparing.digests == plenty.digests
    for metric in (SNIP.metric, WANDA.metric):
        criterion = Criterion(metric, group)
        one = candidate(criterion)
        assert sparing.evaluate(one) == plenty.evaluate(one)


def test_collected_matrices_are_rounded_once_and_scores_stay_fp32(plenty):
    rounding = Evaluator(with_memory(True))
    rounded = rounding.collect_statistics(0)
    rounding.use_statistics(0, rounded)
    rounding.use_scale(plenty.scale)
    exact = plenty.residents[0].statistics.to_tensors()
    assert rounded.keys() == exact.keys()
    for name, tensor in rounded.items():
        expected = exact[name].cpu()
        if not name.startswith("X/"):
            expected = expected.bfloat16()
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, expected)
        assert tensor.dtype == expected.dtype
    probe = rounding.probe_tensors(0)
    name = next(name for name in probe if name.startswith("G/"))
    assert probe[name].dtype == torch.float32
    assert torch.equal(probe[name], probe[name].bfloat16().float())
    assert rounding.evaluate(candidate(SNIP)).kind == "evaluated"
