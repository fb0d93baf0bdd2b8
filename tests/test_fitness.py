"""An evaluator prunes, measures and restores, exactly, and decides as its stages say."""

from dataclasses import replace

import pytest
import torch

from evaluation.perplexity import window_losses
from pruning.masks import lowest_in_model, lowest_per_row
from pruning.models import linear_layers, load_model
from search.fitness import Evaluator, InProcessPool, Setup
from search.population import Candidate


@pytest.fixture(scope="module")
def setup():
    generator = torch.Generator().manual_seed(0)
    windows = {
        role: torch.randint(3, 1000, (4, 32), generator=generator)
        for role in ("calibration", "fitness", "selection", "report")
    }
    return Setup(
        model="embedded",
        dtype="float32",
        device="cpu",
        threads=1,
        windows=windows,
        sparsity=0.5,
        pattern=None,
        stages=(),
        slack=0.1,
        hopeless=100.0,
    )


@pytest.fixture(scope="module")
def evaluator(setup):
    made = Evaluator(setup)
    made.collect_statistics()
    return made


def weights_of(evaluator):
    return {name: layer.weight.clone() for name, layer in evaluator._layers.items()}


def test_pruned_zeroes_the_masked_weights_and_keeps_the_others(evaluator):
    dense = weights_of(evaluator)
    with evaluator.pruned("W", "row"):
        for name, weight in weights_of(evaluator).items():
            mask = lowest_per_row(dense[name].abs(), 0.5)
            assert torch.equal(weight, dense[name].masked_fill(mask, 0))


def test_pruned_over_the_model_uses_one_threshold(evaluator):
    dense = weights_of(evaluator)
    masks = lowest_in_model({name: w.abs() for name, w in dense.items()}, 0.5)
    with evaluator.pruned("W", "model"):
        for name, weight in weights_of(evaluator).items():
            assert torch.equal(weight, dense[name].masked_fill(masks[name], 0))


@pytest.mark.parametrize("metric", ["mul(W, sqrt(X))", "sub(W, W)", "exp(exp(exp(mul(W, X))))"])
def test_evaluate_restores_every_weight_bit_for_bit(evaluator, metric):
    dense = weights_of(evaluator)
    evaluator.evaluate(Candidate(0, metric, "row"))
    for name, weight in weights_of(evaluator).items():
        assert torch.equal(weight, dense[name])


def test_evaluate_gives_the_mean_loss_of_the_pruned_model(evaluator, setup):
    outcome = evaluator.evaluate(Candidate(0, "mul(W, sqrt(X))", "row"))
    model = load_model("embedded", "float32")
    for name, layer in linear_layers(model).items():
        weight, X = layer.weight.detach(), evaluator.statistics.X[name]
        layer.weight.data[lowest_per_row(weight.abs() * X.sqrt(), 0.5)] = 0
    expected = window_losses(model, setup.windows["fitness"]).mean().item()
    assert outcome.kind == "evaluated"
    assert outcome.fitness == pytest.approx(expected, abs=1e-9)
    assert outcome.tokens == 4 * 32


def test_evaluate_is_the_same_after_other_candidates(evaluator):
    first = evaluator.evaluate(Candidate(0, "mul(W, G)", "model"))
    evaluator.evaluate(Candidate(1, "W", "layer"))
    assert evaluator.evaluate(Candidate(2, "mul(W, G)", "model")) == first


def test_evaluate_stops_after_a_stage_above_the_threshold(evaluator, setup):
    staged = Evaluator(replace(setup, stages=(1, 2)), evaluator.statistics)
    full = evaluator.evaluate(Candidate(0, "neg(W)", "row"))
    dense = window_losses(staged._model, setup.windows["fitness"]).mean().item()
    stopped = staged.evaluate(Candidate(0, "neg(W)", "row", stop_above=dense + 0.01))
    passed = staged.evaluate(Candidate(0, "neg(W)", "row", stop_above=full.fitness + 10))
    assert (stopped.kind, stopped.fitness, stopped.tokens) == ("stopped", None, 32)
    assert stopped.reason.startswith("NLL rise ")
    assert passed == full


def test_a_hopeless_candidate_is_stopped_though_the_population_is_not_full(evaluator, setup):
    staged = Evaluator(replace(setup, stages=(1,), hopeless=0.01), evaluator.statistics)
    assert staged.evaluate(Candidate(0, "neg(W)", "row")).kind == "stopped"


def test_a_metric_that_no_mask_can_be_made_of_is_degenerate(evaluator):
    outcome = evaluator.evaluate(Candidate(0, "sub(W, W)", "row"))
    assert outcome.kind == "degenerate"
    assert "model.layers.0.self_attn.q_proj: the scores of 'sub(W, W)' are constant" in (
        outcome.reason
    )


def test_n_of_m_overrides_the_group(evaluator, setup):
    made = Evaluator(replace(setup, pattern=(2, 4)), evaluator.statistics)
    with made.pruned("W", "model"):
        for weight in weights_of(made).values():
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_losses_of_no_metric_are_the_dense_ones(evaluator, setup):
    model = load_model("embedded", "float32")
    assert evaluator.losses("report", None, "row") == (
        window_losses(model, setup.windows["report"]).tolist()
    )


def test_losses_of_a_degenerate_metric_are_none(evaluator):
    assert evaluator.losses("report", "sub(W, W)", "row") is None


def test_collect_statistics_collects_the_leaves_asked_and_uses_them(evaluator, setup):
    made = Evaluator(setup)
    tensors = made.collect_statistics(frozenset({"V", "B"}))
    assert {key.split("/", 1)[0] for key in tensors} == {"V", "B"}
    assert set(made.statistics.V) == set(made.statistics.B) == set(evaluator.statistics.X)


def test_probe_covers_early_middle_and_late_blocks(evaluator):
    names = {key.split("/", 1)[1].split(".")[2] for key in evaluator.probe_tensors()}
    assert names == {"0", "2", "3"}


def test_in_process_pool_gives_outcomes_in_order(evaluator):
    pool = InProcessPool(evaluator)
    assert pool.next_outcome() is None
    for index, metric in enumerate(["W", "mul(W, G)"]):
        pool.submit(Candidate(index, metric, "row"))
    assert [pool.next_outcome()[0] for _ in range(2)] == [0, 1]
    assert set(pool.timings) == {0, 1}
