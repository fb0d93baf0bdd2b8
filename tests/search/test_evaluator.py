"""An evaluator prunes, measures and restores, exactly, and decides as its stages say."""

from copy import copy
from dataclasses import replace
from functools import cache, partial
from itertools import product, zip_longest
from math import sqrt
from shutil import copy2

import pytest
import torch
from toy_models import assert_same_tensors, losses_in, weights_of
from toy_setup import (
    CONSTANT,
    MAGNITUDE,
    NEGATIVE,
    SNIP,
    WANDA,
    criterion_of,
    embedded_setup,
    made_of,
    small,
)

from prunevolve.pruning.metric import Criterion
from prunevolve.pruning.models import load_model
from prunevolve.pruning.passes import Procedure
from prunevolve.pruning.pruner import prune
from prunevolve.pruning.store import ResidentStore
from prunevolve.search.evaluator import SLACK, Evaluator
from prunevolve.search.records import Candidate, Limits

candidate = partial(Candidate, 0)


@pytest.fixture(scope="module")
def evaluator():
    return made_of(embedded_setup(*small(4), "pruning.sparsity=0.7"))


@pytest.fixture(scope="module")
def on_two_models(tiny_llama_dir):
    text = "{corpus: embedded, split: '%s', windows: 3, length: 16}"
    texts = ", ".join(f"{r}: {text % r}" for r in ("calibration", "fitness", "selection", "report"))
    other = f"{{model: {tiny_llama_dir}, sparsity: 0.25, weight: 2, {texts}}}"
    tasks = f"tasks=[{{}}, {other}, {{pattern: '2:4', weight: 3}}]"
    return made_of(embedded_setup(*small(4), tasks))


def staged(evaluator, *stages):
    """Return it with other stages, and a scale of its own."""
    made, config = copy(evaluator), evaluator.experiment.config
    search = config.search.model_copy(update={"stages": list(stages)})
    config = config.model_copy(update={"search": search})
    made.experiment = replace(evaluator.experiment, config=config)
    return made


def given(made, evaluator):
    for resident, other in zip(made.residents, evaluator.residents, strict=True):
        resident.use_statistics(other.statistics)
    made.scale = evaluator.scale


def rescaled(evaluator, *cells):
    own = [
        replace(cell, **update)
        for cell, update in zip_longest(evaluator.scale.cells, cells, fillvalue={})
    ]
    evaluator.scale = replace(evaluator.scale, cells=own)


def assert_dense(evaluator):
    for resident, subject in zip(evaluator.residents, evaluator.experiment.subjects, strict=True):
        dense = load_model(subject.model, subject.dtype)
        assert_same_tensors(weights_of(resident.store.model), weights_of(dense))


def subject_of(evaluator, task):
    return evaluator.experiment.subjects[evaluator.experiment.subject_of[task]]


def dense_store(evaluator, task):
    subject = subject_of(evaluator, task)
    return ResidentStore(load_model(subject.model, subject.dtype))


@cache
def pruned(evaluator, task, criterion=WANDA):
    store, target = dense_store(evaluator, task), evaluator.experiment.target(task, criterion.group)
    calibration = subject_of(evaluator, task).tokens["calibration"]
    prune(store, Procedure(criterion.metric, target), {"calibration": calibration})
    return store


def rises_under_wanda(evaluator, task):
    """Return each fitness window's rise of NLL over dense, (N,), without the evaluator."""
    windows = subject_of(evaluator, task).tokens["fitness"]
    dense = losses_in(dense_store(evaluator, task), windows)
    return losses_in(pruned(evaluator, task), windows) - dense


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
    made = staged(on_two_models, 1)
    limits = limit if limit is None else Limits(limit, limit)
    outcome = made.evaluate(candidate(criterion, limits=limits))
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert_dense(made)


def test_mistake_is_no_fault_of_the_metric(evaluator):
    criterion = criterion_of("mul(W, M)")
    message = r"metric 'mul\(W, M\)' uses M, and M is None: pass it"
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate(candidate(criterion))
    with pytest.raises(ValueError, match=message):
        evaluator.losses(0, "report", criterion)
    assert_dense(evaluator)


def test_fitness_is_the_mean_of_the_tasks_relative_rises_by_weight_also_in_stages(on_two_models):
    half, other, two_of_four = (
        rises_under_wanda(on_two_models, task).mean().item() / cell.rise
        for task, cell in enumerate(on_two_models.scale.cells)
    )
    outcome = on_two_models.evaluate(candidate(WANDA))
    expected = (1 * half + 2 * other + 3 * two_of_four) / 6
    assert outcome.fitness == pytest.approx(expected, rel=1e-6)
    assert (outcome.kind, outcome.tokens) == ("evaluated", 4 * 32 + 3 * 16 + 4 * 32)
    # Stages that do not stop change nothing, and without any nothing stops.
    limited = candidate(WANDA, limits=Limits(1e9, 1e9))
    assert staged(on_two_models, 1, 2).evaluate(limited) == outcome
    assert on_two_models.evaluate(candidate(WANDA, limits=Limits(0.0, 0.0))) == outcome


@pytest.mark.parametrize("bad_on", [0, 1, 2])
def test_stopped_on_one_task_costs_those_after_it_nothing(on_two_models, bad_on):
    made = staged(on_two_models, 1)
    hard = {"rise": 1e-9, "dense": (0.0,) * len(made.scale.cells[bad_on].dense)}
    rescaled(made, *(hard if task == bad_on else {"rise": 1e6} for task in range(3)))
    stopped = made.evaluate(candidate(NEGATIVE, limits=Limits(1.0, 2.0)))
    tokens = (32, 16, 32)
    assert (stopped.kind, stopped.tokens) == ("stopped", sum(tokens[: bad_on + 1]))
    assert stopped.reason.endswith(" above 2.0000")


def test_stages_divide_the_rise_by_the_profile_and_give_slack_by_windows(evaluator):
    rises = rises_under_wanda(evaluator, 0)
    for windows, share in ((1, 2.0), (2, 1.25), (3, 1.1)):
        made = staged(evaluator, windows)
        rescaled(made, {"shares": (2.0, 0.5, 0.8, 0.7), "rise": 0.5})
        rise = rises[:windows].mean().item() / share / 0.5
        best = rise / (1 + SLACK / sqrt(windows))
        full = made.evaluate(candidate(WANDA, limits=Limits(best + 1e-5, best + 1e-5)))
        assert (full.kind, full.reason, full.tokens) == ("evaluated", "", 4 * 32)
        stopped = made.evaluate(candidate(WANDA, limits=Limits(best - 1e-5, rise - 1e-5)))
        assert (stopped.kind, stopped.fitness, stopped.tokens) == ("stopped", None, windows * 32)
        assert stopped.reason == f"relative rise {rise:.4f} above {rise - 1e-5:.4f}"
        ended = made.evaluate(candidate(WANDA, limits=Limits(best - 1e-5, rise + 1e-5)))
        assert (ended.kind, ended.fitness) == ("evaluated", pytest.approx(rise))


def test_losses_are_those_of_the_pruned_model_or_of_the_dense_one(on_two_models):
    for task in range(3):
        windows = subject_of(on_two_models, task).tokens["selection"]
        for criterion in (SNIP, WANDA, MAGNITUDE):
            expected = losses_in(pruned(on_two_models, task, criterion), windows).tolist()
            assert on_two_models.losses(task, "selection", criterion) == pytest.approx(expected)
        dense = losses_in(dense_store(on_two_models, task), windows)
        assert on_two_models.losses(task, "selection", None) == dense.tolist()
    assert on_two_models.losses(0, "report", CONSTANT) is None
    assert_dense(on_two_models)


def with_memory(low_memory):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return embedded_setup(f"low_memory={low_memory}", terminals="XGM", device=device)


@pytest.fixture(scope="module")
def plenty():
    return made_of(with_memory(False))


def test_scores_made_again_change_nothing(plenty):
    sparing = Evaluator(with_memory(True))
    given(sparing, plenty)
    for metric, group in product((SNIP.metric, WANDA.metric), ("row", "model")):
        one = candidate(Criterion(metric, group))
        assert sparing.evaluate(one) == plenty.evaluate(one)


def test_collected_matrices_are_rounded_once_and_probed_in_fp32(plenty):
    rounding = Evaluator(with_memory(True))
    rounded = rounding.collect_statistics(0)
    rounding.residents[0].use_statistics(rounded)
    exact = {name: tensor.cpu() for name, tensor in plenty.residents[0].statistics.items()}
    matrices = {name: t.bfloat16() for name, t in exact.items() if not name.startswith("X/")}
    assert_same_tensors(rounded, exact | matrices)
    G = next(t for name, t in rounding.probe_tensors(0).items() if name.startswith("G/"))
    assert G.dtype == torch.float32
    assert torch.equal(G, G.bfloat16().float())


def test_losses_that_are_not_finite_are_none_and_refused_of_the_dense_model(
    evaluator, tiny_llama_dir, tmp_path
):
    broken = Evaluator(evaluator.experiment)
    given(broken, evaluator)
    norm = broken.residents[0].store.model.model.norm
    for value in (1e6, torch.nan):  # losses of thousands of nats, whose perplexity is infinite
        norm.weight.data.fill_(value)
        assert broken.losses(0, "selection", WANDA) is None
    problem = "must have finite losses on its {} text, got one that is not, in float32: set dtype"
    with pytest.raises(ValueError, match=f"model 'embedded' {problem.format('selection')}"):
        broken.losses(0, "selection", None)
    model = load_model(str(tiny_llama_dir), "float32")
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    copy2(tiny_llama_dir / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match=problem.format("fitness")):
        Evaluator(embedded_setup(*small(2, length=16), f"model={tmp_path}"))
